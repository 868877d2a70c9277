"""Sample calls of every operator, as models make them."""

from typing import Any

import torch

import quant_core.ops  # noqa: F401 - defines the operators

npu = torch.ops.npu


def operator_of(name: str) -> Any:
    """An operator of our table, whose name has an overload in it if that is not the default."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(npu, packet), overload or "default")


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A floating input."""
    return torch.randn(shape).to(dtype)


def i8(*shape: int) -> torch.Tensor:
    """An int8 operand."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def int4(*shape: int) -> torch.Tensor:
    """An int4 operand, eight values to an int32."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def u8(*shape: int) -> torch.Tensor:
    """Two FP4 values to a byte, or exponents."""
    return torch.randint(100, 130, shape, dtype=torch.uint8)


def f8(*shape: int) -> torch.Tensor:
    """An FP8 operand."""
    return x(*shape).to(torch.float8_e4m3fn)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales."""
    return torch.ones(shape, dtype=dtype)


def numbers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Group lists and the like."""
    return torch.tensor(values, dtype=dtype)


def stacked(values: torch.Tensor) -> torch.Tensor:
    """Weights [E, n, k] as the view [E, k, n]."""
    return values.transpose(1, 2)


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
E8M0 = {"scale_dtype": 293, "pertoken_scale_dtype": 293}
MXFP4 = {"x1_dtype": 296, "x2_dtype": 296, "group_sizes": [1, 1, 32]}

#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "quantize": ("npu_quantize", (x(3, 8), ones(1), ones(1), torch.qint8, -1, True), {}),
    "quantize uint8": ("npu_quantize", (x(2, 3, 8), ones(8), None, torch.quint8, -1, False), {}),
    "quantize transposed": ("npu_quantize", (x(8, 3).t(), ones(1), None, torch.qint8, -1), {}),
    "quantize a slice": ("npu_quantize", (x(8, 16)[:, 4:12], ones(8), None, torch.qint8, -1), {}),
    "quantize a permutation": ("npu_quantize", (x(2, 3, 4).permute(2, 0, 1), ones(1), None, torch.qint8, -1), {}),
    "dynamic": ("npu_dynamic_quant", (x(3, 8),), {}),
    "dynamic 3-D": ("npu_dynamic_quant", (x(2, 3, 8, dtype=f32),), {"smooth_scales": ones(8)}),
    "dynamic int4": ("npu_dynamic_quant", (x(2, 3, 16),), {"dst_type": torch.quint4x2}),
    "dynamic with offsets": ("npu_dynamic_quant_asymmetric", (x(3, 8),), {}),
    "dynamic with offsets, 3-D": (
        "npu_dynamic_quant_asymmetric",
        (x(2, 3, 8, dtype=f32),),
        {"smooth_scales": ones(8)},
    ),
    "dynamic int4 with offsets": ("npu_dynamic_quant_asymmetric", (x(2, 3, 16),), {"dst_type": torch.quint4x2}),
    "dynamic with offsets, transposed": ("npu_dynamic_quant_asymmetric", (x(8, 3, dtype=f16).t(),), {}),
    "quantize int4": ("npu_quantize", (x(3, 16), ones(3), None, torch.quint4x2, -2, False), {}),
    "dynamic transposed": ("npu_dynamic_quant", (x(8, 3, dtype=f16).t(),), {"dst_type": torch.int8}),
    "matmul bf16": (
        "npu_quant_matmul",
        (i8(3, 8), i8(5, 8).t(), ones(5)),
        {"pertoken_scale": ones(3), "bias": ones(5), "output_dtype": bf16},
    ),
    "matmul int8": ("npu_quant_matmul", (i8(3, 8), i8(8, 5), ones(5)), {"offset": ones(1)}),
    "matmul int32": ("npu_quant_matmul", (i8(3, 8), i8(8, 5), ones(1)), {"output_dtype": torch.int32}),
    "matmul encoded": (
        "npu_quant_matmul",
        (i8(3, 8), i8(8, 5), npu.npu_trans_quant_param(ones(5))),
        {"bias": torch.ones(5, dtype=torch.int32), "output_dtype": f16},
    ),
    "matmul batches": ("npu_quant_matmul", (i8(2, 1, 3, 8), i8(4, 8, 5), ones(5)), {"output_dtype": f32}),
    "matmul int4": (
        "npu_quant_matmul",
        (int4(3, 2), int4(24, 2).t(), ones(24)),
        {"pertoken_scale": ones(3), "output_dtype": bf16},
    ),
    "matmul int4 packed along n": ("npu_quant_matmul", (int4(3, 2), int4(16, 3), ones(24)), {"output_dtype": f16}),
    "int4 of a weight": ("npu_convert_weight_to_int4pack", (torch.randint(-8, 8, (5, 16), dtype=torch.int32),), {}),
    "transform": ("npu_kronecker_quant", (x(3, 4, 16), x(4, 4), x(16, 16)), {"dst_dtype": torch.int32}),
    "transform and clip": (
        "npu_kronecker_quant",
        (x(3, 2, 8, dtype=f16), x(2, 2, dtype=f16), x(8, 8, dtype=f16), 0.98),
        {},
    ),
    "encode": ("npu_trans_quant_param", (ones(5),), {}),
    "encode with offset": ("npu_trans_quant_param", (ones(1), ones(5), 1), {}),
    "weight only": (
        "npu_weight_quant_batchmatmul",
        (x(3, 8), i8(5, 8).t(), ones(5, dtype=bf16), ones(5, dtype=bf16)),
        {"bias": ones(5)},
    ),
    "weight only in groups": (
        "npu_weight_quant_batchmatmul",
        (x(3, 8, dtype=f32), i8(8, 5), ones(2, 5)),
        {"antiquant_group_size": 4},
    ),
    "weight only to int8": (
        "npu_weight_quant_batchmatmul",
        (x(3, 8, dtype=f32), i8(8, 5), ones(5), None, ones(1), ones(1)),
        {},
    ),
    "weight only int4 packed along k": (
        "npu_weight_quant_batchmatmul",
        (x(3, 16), int4(24, 2).t(), ones(24, dtype=bf16)),
        {},
    ),
    "weight only int4 packed along n": (
        "npu_weight_quant_batchmatmul",
        (x(3, 16, dtype=f16), int4(16, 3), ones(2, 24, dtype=f16), ones(2, 24, dtype=f16)),
        {"antiquant_group_size": 8},
    ),
    "matmul int8 by int4": (
        "npu_quant_matmul",
        (i8(3, 512), int4(512, 2), npu.npu_trans_quant_param(ones(32)).view(2, 16)),
        {"offset": ones(16), "pertoken_scale": ones(3, 1), "output_dtype": bf16, "group_sizes": [0, 0, 256]},
    ),
    "format": ("npu_format_cast", (i8(5, 8).t(), 29), {}),
    "format of a slice": ("npu_format_cast", (i8(5, 8)[:, ::2], 29), {}),
    "format of FP4 beside FP8": (
        "npu_format_cast",
        (u8(5, 8), 29),
        {"customize_dtype": torch.float8_e4m3fn, "input_dtype": 296},
    ),
    "dynamic fp8": ("npu_dynamic_quant", (x(3, 8),), {"dst_type": torch.float8_e4m3fn}),
    "microscaled fp8": ("npu_dynamic_mx_quant", (x(3, 80),), {"dst_type": torch.float8_e4m3fn}),
    "microscaled fp8, 3-D": ("npu_dynamic_mx_quant", (x(2, 3, 80),), {"dst_type": torch.float8_e5m2, "scale_alg": 1}),
    "microscaled fp8 along another axis": (
        "npu_dynamic_mx_quant",
        (x(2, 96, 4),),
        {"axis": 1, "dst_type": torch.float8_e4m3fn},
    ),
    "microscaled fp4": ("npu_dynamic_mx_quant", (x(3, 80),), {"round_mode": "round"}),
    "microscaled fp4, transposed": ("npu_dynamic_mx_quant", (x(96, 3, dtype=f16).t(),), {}),
    "microscaled on two levels": ("npu_dynamic_dual_level_mx_quant", (x(3, 600),), {"round_mode": "round"}),
    "transform to fp4": ("npu_kronecker_quant", (x(3, 4, 6), x(4, 4), x(6, 6)), {"dst_dtype": 296}),
    "matmul fp8": (
        "npu_quant_matmul",
        (f8(3, 64), f8(5, 64).t(), ones(5)),
        {"pertoken_scale": ones(3), "bias": ones(5), "output_dtype": bf16},
    ),
    "matmul mxfp8": (
        "npu_quant_matmul",
        (f8(3, 80), f8(5, 80).t(), u8(5, 2, 2).transpose(0, 1)),
        {"pertoken_scale": u8(3, 2, 2), "output_dtype": bf16, "group_sizes": [1, 1, 32], **E8M0},
    ),
    "matmul mxfp8 by mxfp4": (
        "npu_quant_matmul",
        (f8(3, 80), u8(5, 40).t(), u8(5, 2, 2).transpose(0, 1)),
        {"pertoken_scale": u8(3, 2, 2), "output_dtype": f16, "group_sizes": [0, 0, 32], "x2_dtype": 296, **E8M0},
    ),
    "matmul mxfp4": (
        "npu_quant_matmul",
        (u8(3, 40), u8(5, 40).t(), u8(5, 2, 2).transpose(0, 1)),
        {
            "pertoken_scale": u8(3, 2, 2),
            "bias": ones(5),
            "output_dtype": bf16,
            "group_sizes": [1, 1, 32],
            **MXFP4,
            **E8M0,
        },
    ),
    "matmul mxfp4 packed along n": (
        "npu_quant_matmul",
        (u8(3, 40), u8(80, 3), u8(6, 2, 2).transpose(0, 1)),
        {
            "pertoken_scale": u8(3, 2, 2),
            "output_dtype": bf16,
            "group_sizes": [1, 1, 32],
            **MXFP4,
            **E8M0,
        },
    ),
    "matmul on two levels": (
        "npu_dual_level_quant_matmul",
        (u8(3, 300), u8(5, 300), ones(3, 2), ones(2, 5), u8(3, 10, 2), u8(5, 10, 2)),
        {"bias": ones(5), "output_dtype": f16},
    ),
}

#: The same for operands that only our kernels take: weights that come decoded.
DECODED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "matmul fp8, decoded": (
        "npu_quant_matmul",
        (f8(3, 64), x(5, 64).t(), ones(5)),
        {"pertoken_scale": ones(3), "bias": ones(5), "output_dtype": bf16},
    ),
    "matmul mxfp8, decoded": (
        "npu_quant_matmul",
        (f8(3, 80), x(5, 80).t(), u8(5, 2, 2).transpose(0, 1)),
        {"pertoken_scale": u8(3, 2, 2), "output_dtype": bf16, "group_sizes": [1, 1, 32], **E8M0},
    ),
    "matmul mxfp8 by mxfp4, decoded": (
        "npu_quant_matmul",
        (f8(3, 80), i8(5, 80).t(), u8(5, 2, 2).transpose(0, 1)),
        {"pertoken_scale": u8(3, 2, 2), "output_dtype": f16, "group_sizes": [0, 0, 32], "x2_dtype": 296, **E8M0},
    ),
    "matmul mxfp4, decoded": (
        "npu_quant_matmul",
        (u8(3, 40), i8(5, 80).t(), u8(5, 2, 2).transpose(0, 1)),
        {"pertoken_scale": u8(3, 2, 2), "bias": ones(5), "output_dtype": bf16, **MXFP4, **E8M0},
    ),
    "matmul on two levels, decoded": (
        "npu_dual_level_quant_matmul",
        (u8(3, 300), i8(5, 600), ones(3, 2), ones(2, 5), u8(3, 10, 2), u8(5, 10, 2)),
        {"bias": ones(5), "output_dtype": f16},
    ),
}
