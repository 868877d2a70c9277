"""What the experts returned, back to the tokens: a weighted sum for each (docs/operators.md, section 9)."""

import torch
from torch import Tensor

# Tokens whose rows are added up at a time: the float32 values of all their rows stay in the cache.
_TOKENS = 32


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """Σ_k probs[i, k] · permuted_tokens[sorted_indices[i · K + k]], in float32.

    Args:
        permuted_tokens: [rows, H].
        sorted_indices: int32 [tokens · K]; a choice that is below zero has no row.
        probs: [tokens, K]; without them K is 1. A choice whose weight is zero contributes nothing, whatever its row
            holds: so callers mark those that have none.
        padded_mode: not supported on CPU.
        restore_shape: of padded_mode.

    Returns:
        [tokens, H] in the dtype of permuted_tokens.

    Raises:
        NotImplementedError: for padded_mode.

    """
    if padded_mode:
        raise NotImplementedError("npu_moe_token_unpermute: the CPU kernel has no padded_mode")
    width = 1 if probs is None else probs.shape[1]
    return _combined(permuted_tokens, sorted_indices.view(-1, width), probs, None, None)


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
    """skip1 + skip2 + Σ_k scales[i, k] · (row of choice k of token i + bias of its expert), in float32.

    Args:
        expanded_permuted_rows: [rows, H]; with drop_pad_mode 1 or 3 [E, capacity, H].
        skip1: [tokens, H].
        skip2: [tokens, H], only beside skip1.
        bias: [E, H].
        scales: [tokens, K]; see npu_moe_token_unpermute for weights that are zero. Without them all are 1.
        expanded_src_to_dst_row: int32 [tokens · K]: the row of choice k of token i at i + k · tokens, or, with
            drop_pad_mode 2 or 3, at i · K + k. A choice below zero has no row, and a bias all the same.
        export_for_source_row: the expert of each choice [tokens, K], for the bias.
        drop_pad_mode: 0 to 3.
        k: K, where there are no scales.

    Returns:
        [tokens, H] in the dtype of expanded_permuted_rows.

    Raises:
        ValueError: for a skip2 without skip1, a bias without experts, or another mode.

    """
    if drop_pad_mode not in (0, 1, 2, 3) or (skip1 is None and skip2 is not None):
        raise ValueError(
            f"npu_moe_finalize_routing: drop_pad_mode is {drop_pad_mode}, expected 0 to 3; skip1 given: "
            f"{skip1 is not None}, skip2 given: {skip2 is not None}"
        )
    if bias is not None and export_for_source_row is None:
        raise ValueError("npu_moe_finalize_routing: a bias needs export_for_source_row, which says of which expert")
    width = scales.shape[1] if scales is not None else k or 1
    by_column = drop_pad_mode in (0, 1)
    index = expanded_src_to_dst_row.view(width, -1).t() if by_column else expanded_src_to_dst_row.view(-1, width)
    added = None if bias is None or export_for_source_row is None else (bias, export_for_source_row)
    skips = [skip for skip in (skip1, skip2) if skip is not None]
    return _combined(expanded_permuted_rows.flatten(0, -2), index, scales, added, skips)


def _combined(
    rows: Tensor,
    index: Tensor,
    weights: Tensor | None,
    added: tuple[Tensor, Tensor] | None,
    skips: list[Tensor] | None,
) -> Tensor:
    """The weighted sums of rows [n, H] at index [tokens, K], `added` a bias for each expert and the experts."""
    result = torch.empty(len(index), rows.shape[1], dtype=rows.dtype, device="cpu")
    for start in range(0, len(index), _TOKENS):
        part = slice(start, start + _TOKENS)
        values = _rows_of(rows, index[part], None if weights is None else weights[part])
        if added is not None:
            bias, experts = added
            values += bias.to(torch.float32)[experts[part].long()]
        if weights is not None:
            values *= weights[part].to(torch.float32)[..., None]
        total = values.sum(dim=1)
        for skip in skips or ():
            total += skip[part]
        result[part] = total
    return result


def _rows_of(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """float32 [tokens, K, H]; zero where there is no row, or where its weight is zero."""
    nothing = index < 0
    if weights is not None:
        nothing |= weights == 0
    absent = bool(nothing.any())
    if absent:
        index = index.masked_fill(nothing, 0)
        if not len(rows):
            return torch.zeros(*index.shape, rows.shape[1], dtype=torch.float32, device="cpu")
    values = rows.index_select(0, index.flatten()).to(torch.float32).view(*index.shape, rows.shape[1])
    return values.masked_fill_(nothing[..., None], 0.0) if absent else values
