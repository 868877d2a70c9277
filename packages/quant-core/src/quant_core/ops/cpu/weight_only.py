"""Products of floating activations with an integer weight (docs/operators.md, section 7)."""

from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.microscaling import combine_blocks_
from quant_core.ops.cpu.blocks import product
from quant_core.ops.cpu.int4 import int8_weight
from quant_core.ops.cpu.quantize import saturated


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x @ ((weight + offset) * scale) + bias. The offset is added: a format that subtracts passes it negated.

    Args:
        x: [m, k] floating.
        weight: int8 [k, n], or int4 in int32 [k, n / 8] or [k / 8, n].
        antiquant_scale: in x's dtype: [1], [n], [1, n], or [ceil(k / group), n].
        antiquant_offset: as the scale.
        quant_scale: of an int8 output: [1] or [n].
        quant_offset: of an int8 output.
        bias: [n].
        antiquant_group_size: input features that share a scale; 0 for all.
        inner_precise: a hint for the device.
        weight_dtype: None, for int8.

    Returns:
        [m, n] in x's dtype, or int8.

    Raises:
        NotImplementedError: for weights of other types.
        ValueError: for a scale or offset in another dtype than x, which the device refuses, or more axes than it takes.

    """
    if x.dim() != 2:
        raise ValueError(f"npu_weight_quant_batchmatmul: x has the shape {list(x.shape)}, the device takes [m, k] only")
    if weight.dtype == torch.int32:
        weight = int8_weight(weight, x.shape[1])
    if weight.dtype != torch.int8 or weight_dtype is not None:
        raise NotImplementedError(f"npu_weight_quant_batchmatmul: the CPU kernel has int8 weights, not {weight.dtype}")
    if any(t is not None and t.dtype != x.dtype for t in (antiquant_scale, antiquant_offset)):
        raise ValueError(
            f"npu_weight_quant_batchmatmul: antiquant_scale and antiquant_offset must be {x.dtype}, as x is"
        )
    values = product(
        x.to(torch.float32),
        weight.shape[1],
        _Dequantiser(weight, antiquant_scale, antiquant_offset, antiquant_group_size),
    )
    if bias is not None:
        values += bias.to(torch.float32)
    if quant_scale is None:
        return values.to(x.dtype)
    values = values * quant_scale.to(torch.float32)
    if quant_offset is not None:
        values = values + quant_offset.to(torch.float32)
    return saturated(values).to(torch.int8)


class _Dequantiser:
    """Makes float32 rows of (weight + offset) · scale in memory that it uses again: fresh memory costs more.

    Both steps are rounded to the dtype of the scale, as the device does.
    """

    def __init__(self, weight: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> None:
        self._codes = weight.t()
        self._group = group or max(1, weight.shape[0])
        self._steps: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, bool]] = []
        if offset is not None and bool(offset.any()):
            added = _per_row(offset, len(self._codes), group)
            self._steps.append((Tensor.add_, added, not _exact(added)))
        self._steps.append((Tensor.mul_, _per_row(scale, len(self._codes), group), True))
        self._floats = torch.empty(0, weight.shape[0], dtype=torch.float32)
        self._rounded = torch.empty(0, weight.shape[0], dtype=scale.dtype)

    def __call__(self, part: slice) -> Tensor:
        """Some rows [r, k], until the next call."""
        codes = self._codes[part]
        if len(self._floats) < len(codes):
            self._floats, self._rounded = (
                torch.empty(codes.shape, dtype=t.dtype) for t in (self._floats, self._rounded)
            )
        floats, rounded = self._floats[: len(codes)].copy_(codes), self._rounded[: len(codes)]
        for combine, values, inexact in self._steps:
            combine_blocks_(combine, floats, values[part], self._group)
            if inexact and rounded.dtype != torch.float32:
                floats.copy_(rounded.copy_(floats))
        return floats


def _exact(offset: Tensor) -> bool:
    """Whether int8 plus offset needs no rounding in any dtype: 16 bits hold all integers up to 256."""
    return bool((offset == offset.round()).all()) and offset.abs().max().item() <= 128


def _per_row(values: Tensor, n: int, group: int) -> Tensor:
    """Scales or offsets as float32 [n, groups], or [n, 1]."""
    values = values.to(torch.float32)
    return values.reshape(-1, 1).expand(n, 1) if group == 0 else values.t()
