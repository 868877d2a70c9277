"""Sample calls of every operator, as models make them."""

from typing import Any

import torch

import quant_core.ops  # noqa: F401 - defines the operators

npu = torch.ops.npu


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A floating input."""
    return torch.randn(shape).to(dtype)


def i8(*shape: int) -> torch.Tensor:
    """An int8 operand."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales."""
    return torch.ones(shape, dtype=dtype)


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32

#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "quantize": ("npu_quantize", (x(3, 8), ones(1), ones(1), torch.qint8, -1, True), {}),
    "quantize uint8": ("npu_quantize", (x(2, 3, 8), ones(8), None, torch.quint8, -1, False), {}),
    "quantize transposed": ("npu_quantize", (x(8, 3).t(), ones(1), None, torch.qint8, -1), {}),
    "quantize a slice": ("npu_quantize", (x(8, 16)[:, 4:12], ones(8), None, torch.qint8, -1), {}),
    "quantize a permutation": ("npu_quantize", (x(2, 3, 4).permute(2, 0, 1), ones(1), None, torch.qint8, -1), {}),
    "dynamic": ("npu_dynamic_quant", (x(3, 8),), {}),
    "dynamic 3-D": ("npu_dynamic_quant", (x(2, 3, 8, dtype=f32),), {"smooth_scales": ones(8)}),
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
    "format": ("npu_format_cast", (i8(5, 8).t(), 29), {}),
    "format of a slice": ("npu_format_cast", (i8(5, 8)[:, ::2], 29), {}),
}
