"""Gated activations (docs/operators.md, section 6). Arithmetic is float32."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.ops.cpu.groups import ROWS

#: float32 [..., 2 h] to [..., h].
Activation = Callable[[Tensor], Tensor]


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
        raise NotImplementedError(f"npu_clipped_swiglu: the CPU kernel has no interleaved values on axis {dim}")
    whole = None if group_index is None else int(group_index.sum())
    return _activated("npu_clipped_swiglu", x, dim, clipped(alpha, limit, bias, interleaved), whole)


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
    for start in range(0, stop, ROWS):
        part = slice(start, min(stop, start + ROWS))
        result[part] = activation(rows[part].to(torch.float32))
    result[stop:] = 0
    halves = result.view(before, after, cut // 2).transpose(1, 2)
    return halves.contiguous().view(*x.shape[:dim], cut // 2, *x.shape[dim + 1 :])
