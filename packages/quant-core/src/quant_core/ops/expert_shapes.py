"""Fake functions of the operators of experts, equal to torch_npu's Meta kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.ops.dtypes import FLOAT4_E2M1

Operand = Sequence[Tensor] | None

#: Dtypes of rows and of scales that quant_mode of npu_moe_init_routing_v2 makes.
_ROUTED = {
    0: torch.int8,
    1: torch.int8,
    2: torch.float8_e5m2,
    3: torch.float8_e4m3fn,
    9: torch.uint8,
}


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row for each choice, where the choices went, rows of each expert, and scales of the rows."""
    choices = expert_idx.shape[0] * expert_idx.shape[1]
    rows = choices if active_num <= 0 else min(active_num, choices)
    width = x.shape[1] // 2 if quant_mode == 9 else x.shape[1]
    told: tuple[int, ...] = ()
    if expert_tokens_num_flag and expert_tokens_num_type == 2:
        told = (expert_num, 2)
    elif expert_tokens_num_flag:
        told = (active_expert_range[1] - active_expert_range[0] if active_expert_range else expert_num,)
    scale_dtype, of_row = torch.float32, tuple[int, ...]()
    pairs = -(-x.shape[1] // 64)
    if quant_mode in (2, 3):
        scale_dtype, of_row = torch.float8_e8m0fnu, (2 * pairs,)
    elif quant_mode == 9:
        scale_dtype, of_row = torch.float8_e8m0fnu, (pairs, 2)
    elif quant_mode == -1 and scale is not None:
        exponents = x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) or x_dtype == FLOAT4_E2M1
        scale_dtype, of_row = torch.float8_e8m0fnu if exponents else scale.dtype, tuple(scale.shape[1:])
    return (
        x.new_empty((rows, width), dtype=_ROUTED.get(quant_mode, x.dtype)),
        x.new_empty((choices,), dtype=torch.int32),
        x.new_empty(told, dtype=torch.int64),
        x.new_empty(() if quant_mode == 0 else (rows, *of_row), dtype=scale_dtype),
    )


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """A row for each choice, and where the choices went."""
    choices, count = indices.numel(), num_out_tokens or 0
    rows = min(count, choices) if count > 0 else choices + count
    return tokens.new_empty((rows, tokens.shape[1])), tokens.new_empty((choices,), dtype=torch.int32)


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """A row for each token."""
    width = 1 if probs is None else probs.shape[1]
    return permuted_tokens.new_empty((sorted_indices.shape[0] // width, permuted_tokens.shape[1]))


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """A row for each token."""
    tokens = scales.shape[0] if scales is not None else expanded_src_to_dst_row.shape[0] // (k or 1)
    return expanded_permuted_rows.new_empty((tokens, expanded_permuted_rows.shape[-1]))


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and numbers of choices."""
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and scores."""
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(x.shape, dtype=torch.float32)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """One axis halved."""
    shape = list(input.shape)
    shape[dim] //= 2
    return input.new_empty(shape)


def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """One axis halved."""
    return npu_swiglu(x, dim)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """int8 codes, and one float32 scale per token."""
    codes = x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.int8)
    return codes, x.new_empty((x.shape[0],), dtype=torch.float32)
