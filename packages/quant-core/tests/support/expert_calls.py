"""Sample calls of the operators of experts, as models make them."""

from collections.abc import Callable
from typing import Any

import torch
from operator_calls import bf16, f8, f16, f32, i8, int4, ones, u8, x

npu = torch.ops.npu


def numbers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Group lists and the like."""
    return torch.tensor(values, dtype=dtype)


def stacked(values: torch.Tensor) -> torch.Tensor:
    """Weights [E, n, k] as the view [E, k, n]."""
    return values.transpose(1, 2)


IDS = torch.tensor([[0, 2], [1, -1], [2, 0], [7, 1], [0, 1]], dtype=torch.int32)
PLACES = numbers(0, 5, 2, 1, 4, 3, dtype=torch.int32)
ROUTING: dict[str, Any] = {
    "expert_num": 8,
    "expert_tokens_num_type": 1,
    "expert_tokens_num_flag": True,
    "active_expert_range": [0, 3],
}
COUNTS: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": numbers(2, 0, 3)}
EXPONENTS = {"scale_dtype": 293, "per_token_scale_dtype": 293}

#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "route": ("npu_moe_init_routing_v2", (x(5, 8), IDS), ROUTING),
    "route and quantise": ("npu_moe_init_routing_v2", (x(5, 8), IDS), {**ROUTING, "quant_mode": 1}),
    "route, every expert's own smoothing": (
        "npu_moe_init_routing_v2",
        (x(5, 8), IDS),
        {**ROUTING, "quant_mode": 1, "scale": ones(3, 8)},
    ),
    "route and quantise statically": (
        "npu_moe_init_routing_v2",
        (x(5, 8, dtype=f16), IDS),
        {**ROUTING, "quant_mode": 0, "scale": ones(1), "offset": ones(1)},
    ),
    "route and microscale": ("npu_moe_init_routing_v2", (x(5, 80), IDS), {**ROUTING, "quant_mode": 3}),
    "route and microscale to fp4": ("npu_moe_init_routing_v2", (x(5, 80), IDS), {**ROUTING, "quant_mode": 9}),
    "route codes with their scales": (
        "npu_moe_init_routing_v2",
        (i8(5, 8), IDS),
        {**ROUTING, "scale": ones(5), "row_idx_type": 1, "expert_tokens_num_type": 0},
    ),
    "route some, in pairs": (
        "npu_moe_init_routing_v2",
        (x(5, 8, dtype=f32), IDS),
        {**ROUTING, "active_num": 4, "expert_tokens_num_type": 2},
    ),
    "route to all, untold": ("npu_moe_init_routing_v2", (x(5, 8), IDS), {"expert_num": 8}),
    "permute": ("npu_moe_token_permute", (x(5, 8), IDS), {}),
    "permute less": ("npu_moe_token_permute", (x(5, 8), IDS[:, 0].contiguous(), -2), {}),
    "unpermute": ("npu_moe_token_unpermute", (x(6, 8), numbers(3, -1, 0, 5, dtype=torch.int32), ones(2, 2)), {}),
    "unpermute one each": ("npu_moe_token_unpermute", (x(3, 8), numbers(2, 0, 1, dtype=torch.int32)), {}),
    "finalize": (
        "npu_moe_finalize_routing",
        (*(x(rows, 8) for rows in (6, 3, 3, 4)), ones(3, 2, dtype=bf16), PLACES, torch.zeros(3, 2, dtype=torch.int32)),
        {},
    ),
    "finalize row by row": (
        "npu_moe_finalize_routing",
        (x(6, 8, dtype=f32), None, None, None, None, numbers(0, 5, 2, -1, 4, 3, dtype=torch.int32), None, 2, 2),
        {},
    ),
    "gate by softmax": ("npu_moe_gating_top_k_softmax", (x(5, 8), None, 2), {}),
    "gate by softmax, some finished": (
        "npu_moe_gating_top_k_softmax",
        (x(2, 3, 8, dtype=f32), torch.tensor([[True, False, False]] * 2), 3),
        {},
    ),
    "gate in groups": (
        "npu_moe_gating_top_k",
        (x(5, 8, dtype=f32), 2),
        {"bias": ones(8), "k_group": 2, "group_count": 4, "group_select_mode": 1, "norm_type": 1, "out_flag": True},
    ),
    "swiglu": ("npu_swiglu", (x(5, 16),), {}),
    "swiglu of an axis": ("npu_swiglu", (x(2, 4, 3, dtype=f16), 1), {}),
    "clipped swiglu": ("npu_clipped_swiglu", (x(5, 16),), {"group_index": numbers(2, 1)}),
    "clipped swiglu of halves": ("npu_clipped_swiglu", (x(2, 5, 16, dtype=f32),), {"interleaved": False}),
    "scale, swiglu, quantise": (
        "npu_dequant_swiglu_quant",
        (torch.randint(-9, 9, (5, 16), dtype=torch.int32),),
        {
            "weight_scale": ones(3, 16),
            "activation_scale": ones(5),
            "quant_scale": ones(3, 8),
            "group_index": numbers(2, 0, 1),
            "activate_left": True,
            "quant_mode": 1,
        },
    ),
    "swiglu and quantise": ("npu_dequant_swiglu_quant", (x(5, 16),), {"quant_mode": 1, "swiglu_mode": 2}),
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


def _routing(mode: int) -> Callable[[], Any]:
    scale = None if mode else ones
    return lambda: npu.npu_moe_init_routing_v2(
        x(4, 64),
        torch.zeros(4, 2, dtype=torch.int32),
        scale=scale and scale(1),
        offset=scale and scale(1),
        active_num=8,
        expert_num=8,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, 8],
        quant_mode=mode,
    )


def _grouped(rows: torch.dtype, weight: Callable[[], Any], **options: Callable[[], Any] | int) -> Callable[[], Any]:
    """Four rows for two experts; everything is made when it is called, on the device of then."""
    return lambda: npu.npu_grouped_matmul(
        [torch.empty(4, 64, dtype=rows)],
        weight(),
        **{"group_list_type": 1, "group_type": 0, "split_item": 2, "output_dtype": bf16, "group_list": numbers(2, 2)}
        | {name: value() if callable(value) else value for name, value in options.items()},
    )


#: The calls whose results on the meta device torch_npu's wheel was asked for.
META_CALLS: dict[str, Callable[[], Any]] = {
    **{
        f"npu_moe_init_routing_v2: bf16 (4,64) topk 2, 8 experts, quant_mode {mode}": _routing(mode)
        for mode in (-1, 0, 1, 2, 3)
    },
    "npu_moe_token_permute: bf16 (4,64) topk 2": lambda: npu.npu_moe_token_permute(x(4, 64), torch.zeros(4, 2).int()),
    "npu_moe_token_unpermute: bf16 (8,64) probs (4,2)": lambda: npu.npu_moe_token_unpermute(
        x(8, 64), torch.zeros(8).int(), x(4, 2)
    ),
    "npu_moe_finalize_routing: bf16 (8,64)": lambda: npu.npu_moe_finalize_routing(
        x(8, 64), None, None, None, x(4, 2), torch.zeros(8).int(), torch.zeros(4, 2).int()
    ),
    "npu_moe_gating_top_k_softmax: bf16 (4,8) k 2": lambda: npu.npu_moe_gating_top_k_softmax(x(4, 8), None, 2),
    "npu_moe_gating_top_k: f32 (4,8) k 2": lambda: npu.npu_moe_gating_top_k(x(4, 8, dtype=f32), 2),
    "npu_swiglu: bf16 (4,64)": lambda: npu.npu_swiglu(x(4, 64)),
    "npu_clipped_swiglu: bf16 (4,64)": lambda: npu.npu_clipped_swiglu(x(4, 64)),
    "npu_dequant_swiglu_quant: int32 (4,64)": lambda: npu.npu_dequant_swiglu_quant(
        torch.zeros(4, 64, dtype=torch.int32),
        weight_scale=ones(2, 64),
        activation_scale=ones(4),
        group_index=numbers(2, 2),
        activate_left=True,
        quant_mode=1,
    ),
    "npu_grouped_matmul: int8 pertoken x(4,64) w(2,64,32) split_item 2": _grouped(
        torch.int8, lambda: [i8(2, 64, 32)], scale=lambda: [x(2, 32)], per_token_scale=lambda: [ones(4)]
    ),
    "npu_grouped_matmul: int8 -> int32 split_item 3": _grouped(
        torch.int8, lambda: [i8(2, 64, 32)], split_item=3, output_dtype=3
    ),
    "npu_grouped_matmul: int8 x, weight a list of 2 (64,32), split_item 2": _grouped(
        torch.int8, lambda: [i8(64, 32), i8(64, 32)], scale=lambda: [x(32)] * 2, per_token_scale=lambda: [ones(4)]
    ),
    "npu_grouped_matmul: w4a8 x int8, w int32 (2,64,4), bias f32 (2,32)": _grouped(
        torch.int8,
        lambda: [int4(2, 64, 4)],
        scale=lambda: [torch.zeros(2, 1, 32, dtype=torch.int64)],
        bias=lambda: [ones(2, 32)],
        per_token_scale=lambda: [ones(4)],
    ),
    "npu_grouped_matmul: w4a16 x bf16, w int32 (2,64,4), antiquant (2,2,32)": _grouped(
        bf16, lambda: [int4(2, 64, 4)], antiquant_scale=lambda: [x(2, 2, 32)], antiquant_offset=lambda: [x(2, 2, 32)]
    ),
    "npu_grouped_matmul: mxfp8 x(4,64) w(2,64,32)": _grouped(
        torch.float8_e4m3fn,
        lambda: [stacked(f8(2, 32, 64))],
        scale=lambda: [u8(2, 32, 1, 2).transpose(1, 2)],
        per_token_scale=lambda: [u8(4, 1, 2)],
        scale_dtype=293,
        per_token_scale_dtype=293,
    ),
    "npu_grouped_matmul_swiglu_quant: int8": lambda: npu.npu_grouped_matmul_swiglu_quant(
        i8(4, 64), i8(2, 64, 32), numbers(2, 4), ones(2, 32), ones(4)
    ),
    "npu_grouped_matmul_swiglu_quant_v2: int8": lambda: npu.npu_grouped_matmul_swiglu_quant_v2(
        i8(4, 64), [i8(2, 64, 32)], [ones(2, 32)], ones(4), numbers(2, 4)
    ),
    "npu_grouped_matmul_swiglu_quant_v2: mxfp8": lambda: npu.npu_grouped_matmul_swiglu_quant_v2(
        f8(4, 64),
        [f8(2, 64, 256)],
        [u8(2, 1, 256, 2)],
        u8(4, 1, 2),
        numbers(2, 4),
        dequant_mode=2,
        quant_mode=2,
        quant_dtype=torch.float8_e4m3fn,
        weight_scale_dtype=293,
        x_scale_dtype=293,
    ),
}
