"""Gated activations, and what is fused with them (docs/operators.md, section 6). Arithmetic is float32."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.ops.cpu.groups import COUNTS, Group, end_of, groups_of
from quant_core.ops.cpu.quantize import npu_dynamic_quant

#: float32 [..., 2 h] to [..., h].
Activation = Callable[[Tensor], Tensor]

# Rows that are computed at a time: their float32 values stay in the cache.
_ROWS = 64


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) · second half.

    Args:
        input: floating; an even number of values along dim.
        dim: the axis that is halved.

    """
    return _activated("npu_swiglu", input, dim, silu_of_left)


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
    """a · sigmoid(alpha · a) · (b + bias), a up to limit, b within ±limit.

    Args:
        x: floating; an even number of values along dim.
        group_index: int64, how many rows (of all axes before dim) each group has. Those behind become zero.
        dim: the axis that is halved.
        alpha: see above.
        limit: see above.
        bias: see above.
        interleaved: a are the even values and b the odd ones; otherwise a is the first half.

    Raises:
        NotImplementedError: for interleaved values on another axis than the last.

    """
    if interleaved and dim not in (-1, x.dim() - 1):
        raise NotImplementedError(
            f"npu_clipped_swiglu: the CPU kernel has interleaved values on the last axis, not {dim}"
        )
    whole = None if group_index is None else int(group_index.sum())
    return _activated("npu_clipped_swiglu", x, dim, clipped(alpha, limit, bias, interleaved), whole)


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
    if swiglu_mode == 0:
        activation = silu_of_left if activate_left else silu_of_right
    else:
        activation = clipped(glu_alpha, clamp_limit, glu_bias, swiglu_mode == 1, activate_left or swiglu_mode == 1)
    groups = [Group(0, slice(0, len(x)))] if len(x) else []
    if group_index is not None:
        if bias is not None:
            raise ValueError("npu_dequant_swiglu_quant: a bias of groups has no meaning")
        groups = groups_of("npu_dequant_swiglu_quant", group_index, COUNTS, len(group_index), len(x))
    tokens = None if activation_scale is None else activation_scale.reshape(-1)
    codes = torch.empty(len(x), x.shape[1] // 2, dtype=torch.int8, device="cpu")
    scales = torch.empty(len(x), dtype=torch.float32, device="cpu")
    for expert, rows in groups:
        columns, smooth = (None if s is None else s if s.dim() == 1 else s[expert] for s in (weight_scale, quant_scale))
        of_rows = None if tokens is None else tokens[rows]
        dequant_activate_quant(x[rows], columns, of_rows, activation, smooth, codes[rows], scales[rows], bias)
    codes[end_of(groups) :], scales[end_of(groups) :] = 0, 0
    return codes, scales


def dequant_activate_quant(
    values: Tensor,
    columns: Tensor | None,
    tokens: Tensor | None,
    activation: Activation,
    smooth: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
) -> None:
    """Scale, activate and quantise per token, by rows that stay in the cache.

    Args:
        values: int32 sums or floating values [m, 2 h].
        columns: a scale for each column, or none.
        tokens: a scale for each row, or none.
        activation: of float32.
        smooth: what is multiplied before quantising [h], or nothing.
        codes: int8 [m, h], filled.
        scales: float32 [m], filled.
        bias: int32, added to the sums.

    """
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        block = values[rows] if bias is None else values[rows] + bias
        floats = block.to(torch.float32) if columns is None else block * columns.to(torch.float32)
        if tokens is not None:
            floats *= tokens[rows, None]
        codes[rows], scales[rows] = npu_dynamic_quant(activation(floats), smooth_scales=smooth)


def silu_of_left(values: Tensor) -> Tensor:
    """silu(first half) · second half."""
    left, right = values.chunk(2, dim=-1)
    return torch.nn.functional.silu(left).mul_(right)


def silu_of_right(values: Tensor) -> Tensor:
    """silu(second half) · first half."""
    left, right = values.chunk(2, dim=-1)
    return torch.nn.functional.silu(right).mul_(left)


def clipped(alpha: float, limit: float, bias: float, interleaved: bool, activate_left: bool = True) -> Activation:
    """a · sigmoid(alpha · a) · (b + bias), with a up to limit and b within ±limit."""

    def activation(values: Tensor) -> Tensor:
        a, b = (values[..., 0::2], values[..., 1::2]) if interleaved else values.chunk(2, dim=-1)
        if not activate_left:
            a, b = b, a
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
        return (a * alpha).sigmoid_().mul_(a).mul_(b.add_(bias))

    return activation


def _activated(operator: str, x: Tensor, dim: int, activation: Activation, whole: int | None = None) -> Tensor:
    """An activation in float32 along one axis, by rows that stay in the cache.

    Args:
        operator: for errors.
        x: floating.
        dim: the axis that is halved.
        activation: what to compute.
        whole: how many rows (of all axes before dim) count; zeros take the place of those behind. None for all.

    """
    if not x.dim() or x.shape[dim] % 2:
        raise ValueError(f"{operator}: the input is {list(x.shape)}, axis {dim} of it has no halves")
    dim %= x.dim()
    before, cut, after = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    rows = x.reshape(before, cut, after).transpose(1, 2).reshape(before * after, cut)
    result = torch.empty(before * after, cut // 2, dtype=x.dtype, device="cpu")
    stop = before * after if whole is None else whole * after
    for start in range(0, stop, _ROWS):
        part = slice(start, min(stop, start + _ROWS))
        result[part] = activation(rows[part].to(torch.float32))
    result[stop:] = 0
    return result.view(before, after, cut // 2).transpose(1, 2).reshape(*x.shape[:dim], cut // 2, *x.shape[dim + 1 :])
