"""Sample calls of the operators around the products of experts, as models make them."""

from typing import Any

import torch
from operator_calls import bf16, f16, f32, i8, numbers, ones, x

IDS = torch.tensor([[0, 2], [1, -1], [2, 0], [7, 1], [0, 1]], dtype=torch.int32)
PLACES = numbers(0, 5, 2, 1, 4, 3, dtype=torch.int32)
ROUTING: dict[str, Any] = {
    "expert_num": 8,
    "expert_tokens_num_type": 1,
    "expert_tokens_num_flag": True,
    "active_expert_range": [0, 3],
}
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
}
