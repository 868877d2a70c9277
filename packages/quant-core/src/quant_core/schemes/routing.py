"""Tokens to the experts that they chose, and back: apart from the products, since an engine may do it by itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.schemes.context import ExpertSizes

#: Products whose operator takes a choice without a row as what it is; on others it is row 0 with a weight of zero.
KNOWS_ABSENT = ("950", "cpu")


#: Rows as they go to a product: codes, or the rows themselves; and the codes' scales [m, ...], where rows have any.
Codes = tuple[Tensor, Tensor | None]


class Rows(NamedTuple):
    """The rows of the experts of this rank, sorted by expert. Behind those of the last expert they mean nothing.

    Attributes:
        values: [m, features], or codes of it.
        scale: of the rows [m, ...], where they are codes with scales of their own.
        counts: int64 [local experts], how many rows each expert has.

    """

    values: Tensor
    scale: Tensor | None
    counts: Tensor


def experts_of(rows: Rows) -> Tensor:
    """int64 [m], the local expert of each row; what lies behind the last one's rows counts as that one's."""
    places = torch.arange(len(rows.values), device=rows.values.device)
    return torch.searchsorted(rows.counts.cumsum(0), places, right=True).clamp(max=len(rows.counts) - 1)


def local_table(sizes: ExpertSizes, device: torch.device) -> Tensor | None:
    """int32 [experts]: the place of each expert on this rank, the number of local experts for those that are not here.

    None where all are here, in their order.
    """
    local = sizes.local_experts or tuple(range(sizes.num_experts))
    if local == tuple(range(sizes.num_experts)):
        return None
    table = torch.full((sizes.num_experts,), len(local), dtype=torch.int32, device=device)
    table[list(local)] = torch.arange(len(local), dtype=torch.int32, device=device)
    return table


def route_in(
    x: Tensor, scale: Tensor | None, topk_ids: Tensor, table: Tensor | None, local_experts: int
) -> tuple[Rows, Tensor]:
    """One row for each choice of an expert that is here, sorted by expert.

    Args:
        x: [tokens, hidden], or codes of it.
        scale: [tokens, ...], where x are codes.
        topk_ids: [tokens, k] global ids; a negative one chooses nobody.
        table: see local_table.
        local_experts: how many experts are here.

    Returns:
        The rows, and int32 [tokens · k]: the row of each choice, -1 where its expert is not here.

    """
    ids = topk_ids.to(torch.int32)
    ids = torch.where(ids < 0, local_experts, ids if table is None else table[ids.clamp(min=0)])
    rows, index, counts, scales = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        ids,
        scale=scale,
        active_num=-1,
        expert_num=local_experts + 1,  # one more, whom choices of nobody here go to
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, local_experts],
        row_idx_type=0,
    )
    return Rows(rows, None if scale is None else scales.view(scale.dtype), counts), index


def route_out(rows: Tensor, index: Tensor, topk_weights: Tensor, knows_absent: bool) -> Tensor:
    """The weighted sum of each token's rows [tokens, hidden]; choices without a row add nothing.

    Args:
        rows: [m, hidden], what the experts returned.
        index: the row of each choice, see route_in.
        topk_weights: float32 [tokens, k].
        knows_absent: whether the device is one of KNOWS_ABSENT. Told, because compiled code cannot ask.

    """
    if not knows_absent:
        topk_weights = torch.where(index.view(topk_weights.shape) < 0, 0.0, topk_weights)
        index = index.clamp(min=0)
    y: Tensor = torch.ops.npu.npu_moe_token_unpermute(rows, index, topk_weights)
    return y
