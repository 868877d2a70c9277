"""Inputs that are quantised and dequantised at run time, for products that take floating rows."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_core import microscaling as mx
from quant_core.schemes.context import Partition
from quant_core.schemes.tokens import token_scale
from quant_core.stored import ActivationForm

#: Powers of two by which what the codes stand for is made so small that products in float16 do not overflow.
_TOKEN, _NVFP4 = 2.0**9, 2.0**12

#: The smallest scale that a zero group is divided by.
_TINY = torch.finfo(torch.float32).tiny


def rounded(
    x: Tensor, form: ActivationForm | None, partition: Partition, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """An input as its codes hold it.

    Args:
        x: [m, k].
        form: how it is quantised; None for not at all.
        partition: of the layer: whether ranks agree on the scales of tokens.
        global_scale: float32 [m], or () for all rows, where `form.outer` says that there is one.

    Returns:
        Values [m, k] in x's dtype, and a factor [m], or () for all rows, by which their products are multiplied; None
        where there is none. A factor leaves values that have few bits, which are exact in any dtype.

    """
    if form is None:
        return x, None
    if form.outer == "tensor":
        assert global_scale is not None
        return _nvfp4(x, form.group_size or x.shape[-1], global_scale)
    if form.strategy == "token":
        scale = token_scale(x, mx.E4M3_MAX, partition)
        codes = mx.nearest_e4m3(x.to(torch.float32) / scale[:, None])
        return (codes / _TOKEN).to(x.dtype), scale * _TOKEN
    groups = _in_groups(x, form.group_size or x.shape[-1])
    scale = (groups.abs().amax(-1, keepdim=True) / mx.E4M3_MAX).clamp(min=_TINY)
    return _as_rows(mx.nearest_e4m3(groups / scale) * scale, x), None


def _nvfp4(x: Tensor, length: int, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 in groups with E4M3 scales s = E4M3(global · max|x| / 6), divided by the global one."""
    groups = _in_groups(x, length) * global_scale[..., None, None]
    scale = mx.nearest_e4m3(groups.abs().amax(-1, keepdim=True) / mx.E2M1_MAX)
    # A group without a scale is zero: its values are below the smallest one that could be written.
    codes = mx.nearest_e2m1(groups / torch.where(scale > 0, scale, 1.0))
    return _as_rows(codes * (scale / _NVFP4), x), _NVFP4 / global_scale


def _in_groups(x: Tensor, length: int) -> Tensor:
    """[m, k] as float32 [m, groups, length]; a short last group is filled up with zeros, which change no maximum."""
    padded = pad(x.to(torch.float32), (0, -x.shape[-1] % length))
    groups: Tensor = padded.unflatten(-1, (padded.shape[-1] // length, length))
    return groups


def _as_rows(groups: Tensor, x: Tensor) -> Tensor:
    """[m, groups, length] in shape and dtype of the rows that they came from."""
    return groups.flatten(-2)[:, : x.shape[-1]].to(x.dtype)
