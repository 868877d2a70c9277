"""Sums of products and gated activations to codes (docs/operators.md, section 6). Arithmetic is float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.ops.cpu.activation import Activation, clipped, silu_of_left, silu_of_right
from quant_core.ops.cpu.groups import COUNTS, ROWS, Group, OfExpert, batches_of, end_of, groups_of, of_rows
from quant_core.ops.cpu.quantize import npu_dynamic_quant


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
    """Scale the sums of an int8 product, activate, and quantise per token.

    Args:
        x: int32 sums [m, 2 h], or floating values, which have no scales.
        weight_scale: float32 [groups, 2 h], or [2 h] of all.
        activation_scale: float32 [m] or [m, 1].
        bias: int32 [2 h], added to the sums; not with groups.
        quant_scale: [groups, h], or [h] of all: multiplied before quantising.
        quant_offset: not supported on CPU.
        group_index: int64, how many rows each group has. Rows behind the last one become zero, which the device leaves
            as they are.
        activate_left: whether silu is of the left half. The device's default is the right one.
        quant_mode: 1, per token; for 0, static, documents and reference differ.
        dst_type: None or int8.
        round_mode: to nearest.
        activate_dim: the last axis.
        swiglu_mode: 0 silu(a) · b; 1 as npu_clipped_swiglu with interleaved values; 2 the same with halves.
        clamp_limit: of swiglu_mode 1 and 2.
        glu_alpha: of swiglu_mode 1 and 2.
        glu_bias: of swiglu_mode 1 and 2.

    Returns:
        int8 [m, h] and float32 scales [m].

    Raises:
        NotImplementedError: for modes that the CPU kernel does not have.
        ValueError: for sums without scales, or scales without sums.

    """
    if quant_mode != 1 or quant_offset is not None or dst_type not in (None, 1) or round_mode not in (None, 0):
        raise NotImplementedError(
            f"npu_dequant_swiglu_quant: the CPU kernel quantises to int8 per token (quant_mode={quant_mode}, "
            f"quant_offset given: {quant_offset is not None}, dst_type={dst_type}, round_mode={round_mode})"
        )
    if x.dim() != 2 or activate_dim not in (None, -1, 1) or swiglu_mode not in (0, 1, 2):
        raise NotImplementedError(
            f"npu_dequant_swiglu_quant: the CPU kernel has no x {list(x.shape)} with activate_dim={activate_dim} and "
            f"swiglu_mode={swiglu_mode}"
        )
    sums = x.dtype == torch.int32
    if sums != (weight_scale is not None) or sums < (activation_scale is not None) or sums < (bias is not None):
        raise ValueError(
            f"npu_dequant_swiglu_quant: x is {x.dtype}, weight_scale given: {weight_scale is not None}, "
            f"activation_scale given: {activation_scale is not None}; int32 sums have scales, floating values none"
        )
    activation: Activation = silu_of_left if activate_left else silu_of_right
    if swiglu_mode != 0:
        activation = clipped(glu_alpha, clamp_limit, glu_bias, swiglu_mode == 1, activate_left or swiglu_mode == 1)
    groups = [Group(0, slice(0, len(x)))] if len(x) else []
    if group_index is not None:
        if bias is not None:
            raise ValueError("npu_dequant_swiglu_quant: a bias of groups has no meaning")
        groups = groups_of("npu_dequant_swiglu_quant", group_index, COUNTS, len(group_index), len(x))
    return activate_and_quantise(
        groups,
        lambda batch: x[batch[0].rows.start : batch[-1].rows.stop],
        (len(x), x.shape[1] // 2),
        activation,
        Scales(_by_expert(weight_scale), activation_scale, _by_expert(quant_scale), bias),
    )


def _by_expert(scales: Tensor | None) -> OfExpert:
    """One row of scales for each expert, or one for all."""
    return lambda expert: None if scales is None else scales if scales.dim() == 1 else scales[expert]


class Scales(NamedTuple):
    """What values are multiplied with before and after an activation.

    Attributes:
        columns: a scale for each column, of each expert.
        tokens: a scale for each row, [m] or [m, 1].
        smooth: what the activated values are multiplied with, of each expert.
        bias: int32, added to sums of all experts.

    """

    columns: OfExpert
    tokens: Tensor | None
    smooth: OfExpert
    bias: Tensor | None = None


def activate_and_quantise(
    groups: Sequence[Group],
    values: Callable[[Sequence[Group]], Tensor],
    shape: tuple[int, int],
    activation: Activation,
    given: Scales,
) -> tuple[Tensor, Tensor]:
    """Scale, activate and quantise per token, by rows that stay in the cache.

    Args:
        groups: which rows belong to whom.
        values: int32 sums or floating values [r, 2 h] of some neighbouring groups.
        shape: m and h of all rows; those behind the last group become zero.
        activation: of float32.
        given: scales.

    Returns:
        int8 [m, h] and float32 scales [m].

    """
    codes = torch.empty(shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(shape[0], dtype=torch.float32, device="cpu")
    for batch in batches_of(groups, ROWS):
        found, first = values(batch), batch[0].rows.start
        columns, smooth = of_rows(batch, given.columns), of_rows(batch, given.smooth)
        for start in range(0, len(found), ROWS):
            block = found[start : start + ROWS]
            rows = slice(first + start, first + start + len(block))
            if given.bias is not None:
                block = block + given.bias
            floats = block.to(torch.float32) if columns is None else block * columns
            if given.tokens is not None:
                floats *= given.tokens[rows].reshape(-1, 1)
            activated = activation(floats)
            codes[rows], scales[rows] = npu_dynamic_quant(activated if smooth is None else activated * smooth)
    codes[end_of(groups) :], scales[end_of(groups) :] = 0, 0
    return codes, scales
