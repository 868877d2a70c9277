"""Sample calls of the products of experts, as models make them."""

from typing import Any

import torch
from operator_calls import bf16, f8, f16, f32, i8, int4, numbers, ones, stacked, u8, x

COUNTS: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": numbers(2, 0, 3)}
EXPONENTS = {"scale_dtype": 293, "per_token_scale_dtype": 293}

#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "experts int8": (
        "npu_grouped_matmul",
        ([i8(6, 8)], [stacked(i8(3, 4, 8))]),
        {**COUNTS, "scale": [ones(3, 4, dtype=bf16)], "per_token_scale": [ones(6)], "output_dtype": bf16},
    ),
    "experts int8 to sums": (
        "npu_grouped_matmul",
        ([i8(6, 8)], [stacked(i8(3, 4, 8))]),
        {**COUNTS, "output_dtype": torch.int32},
    ),
    "experts int8 in a list, ends": (
        "npu_grouped_matmul",
        ([i8(6, 8)], [i8(8, 4), i8(8, 4), i8(8, 4)]),
        {
            "scale": [ones(4)] * 3,
            "per_token_scale": [ones(6)],
            "output_dtype": f16,
            "split_item": 3,
            "group_type": 0,
            "group_list": numbers(1, 1, 6),
        },
    ),
    "experts int8, pairs": (
        "npu_grouped_matmul",
        ([i8(6, 8)], [stacked(i8(3, 4, 8))]),
        {
            **COUNTS,
            "scale": [ones(3, 4)],
            "output_dtype": f32,
            "group_list_type": 2,
            "group_list": numbers(2, 4, 0, 2, 0, 0).view(3, 2),
        },
    ),
    "experts int8 each its rows": (
        "npu_grouped_matmul",
        ([i8(2, 8), i8(0, 8), i8(3, 8)], [i8(8, 4), i8(8, 4), i8(8, 6)]),
        {
            "scale": [ones(4), ones(4), ones(6)],
            "per_token_scale": [ones(2), ones(0), ones(3)],
            "output_dtype": bf16,
            "group_type": -1,
        },
    ),
    "experts floating, ends in a list, a result each": (
        "npu_grouped_matmul.List",
        ([x(6, 8)], [x(8, 4), x(8, 4), x(8, 4)]),
        {"split_item": 1, "group_type": 0, "group_list": [2, 2, 6]},
    ),
    "experts int8 by int4": (
        "npu_grouped_matmul",
        ([i8(6, 16)], [int4(3, 16, 2)]),
        {
            **COUNTS,
            "scale": [torch.ones(3, 2, 16).view(torch.int32).to(torch.int64)],
            "bias": [ones(3, 16)],
            "per_token_scale": [ones(6)],
            "output_dtype": bf16,
        },
    ),
    "experts int4": (
        "npu_grouped_matmul",
        ([int4(6, 2)], [stacked(int4(3, 16, 2))]),
        {**COUNTS, "scale": [ones(3, 16)], "per_token_scale": [ones(6)], "output_dtype": bf16},
    ),
    "experts weight only": (
        "npu_grouped_matmul",
        ([x(6, 8)], [stacked(i8(3, 4, 8))]),
        {**COUNTS, "antiquant_scale": [ones(3, 4, dtype=bf16)], "antiquant_offset": [ones(3, 4, dtype=bf16)]},
    ),
    "experts weight only int4 in groups": (
        "npu_grouped_matmul",
        ([x(6, 16, dtype=f16)], [int4(3, 16, 2)]),
        {**COUNTS, "antiquant_scale": [ones(3, 2, 16, dtype=f16)], "antiquant_offset": [ones(3, 2, 16, dtype=f16)]},
    ),
    "experts floating": ("npu_grouped_matmul", ([x(6, 8)], [x(3, 8, 4)]), {**COUNTS, "bias": [ones(3, 4)]}),
    "experts fp8": (
        "npu_grouped_matmul",
        ([f8(6, 64)], [stacked(f8(3, 4, 64))]),
        {**COUNTS, "scale": [ones(3, 4)], "per_token_scale": [ones(6)], "output_dtype": bf16},
    ),
    "experts mxfp8": (
        "npu_grouped_matmul",
        ([f8(6, 80)], [stacked(f8(3, 4, 80))]),
        {
            **COUNTS,
            **EXPONENTS,
            "scale": [u8(3, 4, 2, 2).transpose(1, 2)],
            "per_token_scale": [u8(6, 2, 2)],
            "output_dtype": bf16,
        },
    ),
    "experts mxfp8 by mxfp4": (
        "npu_grouped_matmul",
        ([f8(6, 80)], [stacked(u8(3, 4, 40))]),
        {
            **COUNTS,
            "antiquant_scale": [u8(3, 4, 2, 2).transpose(1, 2)],
            "per_token_scale": [u8(6, 2, 2)],
            "per_token_scale_dtype": 293,
            "weight_dtype": 296,
            "output_dtype": bf16,
        },
    ),
    "experts mxfp4": (
        "npu_grouped_matmul",
        ([u8(6, 40)], [stacked(u8(3, 4, 40))]),
        {
            **COUNTS,
            **EXPONENTS,
            "scale": [u8(3, 4, 2, 2).transpose(1, 2)],
            "per_token_scale": [u8(6, 2, 2)],
            "x_dtype": 296,
            "weight_dtype": 296,
            "output_dtype": bf16,
        },
    ),
    "experts, swiglu, quantise": (
        "npu_grouped_matmul_swiglu_quant",
        (i8(6, 8), stacked(i8(3, 4, 8)), numbers(2, 2, 5), ones(3, 4), ones(6)),
        {},
    ),
    "experts int4, swiglu, quantise": (
        "npu_grouped_matmul_swiglu_quant",
        (i8(6, 16), int4(3, 16, 2), numbers(2, 2, 5), torch.ones(3, 1, 16).view(torch.int32).to(torch.int64), ones(6)),
        {"bias": ones(3, 16)},
    ),
    "experts, swiglu, quantise, counts": (
        "npu_grouped_matmul_swiglu_quant_v2",
        (i8(6, 8), [stacked(i8(3, 4, 8))], [ones(3, 4)], ones(6), numbers(2, 0, 3)),
        {"group_list_type": 1, "smooth_scale": ones(3, 2)},
    ),
    "experts, swiglu, microscale": (
        "npu_grouped_matmul_swiglu_quant_v2",
        (f8(6, 80), [stacked(f8(3, 256, 80))], [u8(3, 256, 2, 2).transpose(1, 2)], u8(6, 2, 2), numbers(2, 2, 5)),
        {
            "dequant_mode": 2,
            "quant_mode": 2,
            "quant_dtype": torch.float8_e4m3fn,
            "weight_scale_dtype": 293,
            "x_scale_dtype": 293,
        },
    ),
}

#: The same for operands that only our kernels take.
DECODED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "experts int8 in groups": (
        "npu_grouped_matmul",
        ([i8(6, 8)], [stacked(i8(3, 4, 8))]),
        {**COUNTS, "scale": [ones(3, 2, 4)], "per_token_scale": [ones(6)], "output_dtype": bf16},
    ),
    # torch_npu's Meta kernel of this overload takes no output_dtype.
    "experts int8, ends in a list": (
        "npu_grouped_matmul.List",
        ([i8(6, 8)], [stacked(i8(3, 4, 8))]),
        {
            "scale": [ones(3, 4)],
            "per_token_scale": [ones(6)],
            "output_dtype": bf16,
            "split_item": 3,
            "group_list": [2, 2, 6],
        },
    ),
    "experts mxfp8, decoded": (
        "npu_grouped_matmul",
        ([f8(6, 80)], [stacked(x(3, 4, 80))]),
        {
            **COUNTS,
            **EXPONENTS,
            "scale": [u8(3, 4, 2, 2).transpose(1, 2)],
            "per_token_scale": [u8(6, 2, 2)],
            "output_dtype": bf16,
        },
    ),
    "experts mxfp8 by mxfp4, decoded": (
        "npu_grouped_matmul",
        ([f8(6, 80)], [stacked(i8(3, 4, 80))]),
        {
            **COUNTS,
            "antiquant_scale": [u8(3, 4, 2, 2).transpose(1, 2)],
            "per_token_scale": [u8(6, 2, 2)],
            "per_token_scale_dtype": 293,
            "weight_dtype": 296,
            "output_dtype": bf16,
        },
    ),
}
