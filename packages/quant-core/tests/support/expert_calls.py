"""Sample calls of all operators of experts, and those that torch_npu's wheel was asked about."""

from collections.abc import Callable
from typing import Any

import grouped_calls
import routing_calls
import torch
from operator_calls import bf16, f8, f32, i8, int4, numbers, ones, stacked, u8, x

npu = torch.ops.npu

CALLS = routing_calls.CALLS | grouped_calls.CALLS
DECODED = grouped_calls.DECODED


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
