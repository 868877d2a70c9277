"""Declared parameters: the tensors of one checkpoint module, and checks of their values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from quant_core.microscaling import E8M0_NAN

#: A check of loaded values: takes the loaded tensor, returns what is wrong with it or None.
ValueCheck = Callable[[torch.Tensor], str | None]


@dataclass(frozen=True)
class Param:
    """One stored tensor of one checkpoint module, declared without allocating it.

    Attributes:
        shape: the stored shape, for full (uncut) sizes.
        dtype: the stored dtype.
        output_dim: axis that follows the output features, if any.
        input_dim: axis that follows the input features, if any.
        output_step: output features per index of `output_dim` (2 for int4 pairs). The last one may stand for fewer if
            the shape has an index for these, as scales of blocks have.
        input_step: input features per index of `input_dim` (the group size for a group's scale).
        shared: all members of a fused layer store the same tensor, and the scheme is handed one of them. Without it, a
            parameter that has no `output_dim` has one entry per member, concatenated on axis 0.
        per_row: what is stored once for several output features is handed to the scheme once for each of them, as if it
            were stored so: of `output_dim` 0 an index for each `output_step` of them, [out, ...]; without one a single
            value, () or [1], for all of the module, [out, 1].
        check: judges loaded values; not asked for dummy weights.
        dummy: the value that `load_format="dummy"` fills in, where a random one would make no sense.
        plain: declared by a tensor (hooks.py): the files may hold another floating dtype, which is converted, or no
            such tensor, for which the scheme is handed zeros.

    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    output_dim: int | None = None
    input_dim: int | None = None
    output_step: int = 1
    input_step: int = 1
    shared: bool = False
    per_row: bool = False
    check: ValueCheck | None = None
    dummy: float | None = None
    plain: bool = False

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether a tensor of this dtype can be loaded."""
        if not self.plain or dtype == self.dtype:
            return dtype == self.dtype
        # Not FP8, which are codes as int8 is, nor bits held in an integer; a zero point is a number in any dtype.
        numbers = [t.is_floating_point and t.itemsize > 1 for t in (dtype, self.dtype)]
        return all(numbers) or (self.shared and any(numbers) and torch.int8 in (dtype, self.dtype))


def same_kind(params: Sequence[Param]) -> bool:
    """Whether the declarations of all members differ in nothing but the number of output features."""

    def kind(param: Param) -> Param:
        shape = list(param.shape)
        if param.output_dim is not None:
            shape[param.output_dim] = -1
        return replace(param, shape=tuple(shape))

    return len({kind(param) for param in params}) <= 1


def float_values(stored: torch.Tensor) -> torch.Tensor:
    """A stored scale as float32: int64 holds the bits of a float32 in its low half (docs/formats/modelslim.md, 4.1)."""
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32)
    return stored.to(torch.float32)


def positive(stored: torch.Tensor) -> str | None:
    """ValueCheck of a scale: finite and above zero."""
    values = float_values(stored)
    bad = ~(torch.isfinite(values) & (values > 0))
    return _described(values, bad, "finite and positive")


def integral_int8(stored: torch.Tensor) -> str | None:
    """ValueCheck of an int8 zero point: a whole number from -128 to 127."""
    values = stored.to(torch.float32)
    bad = ~((values == values.round()) & (values >= -128) & (values <= 127))
    return _described(values, bad, "whole numbers from -128 to 127")


def int4(stored: torch.Tensor) -> str | None:
    """ValueCheck of int4 codes in a wider dtype: from -8 to 7."""
    return _described(stored, (stored < -8) | (stored > 7), "int4 values from -8 to 7")


def zero(stored: torch.Tensor) -> str | None:
    """ValueCheck of the offset of a symmetric type: zero."""
    return _described(stored, stored != 0, "zero: the type is symmetric")


def finite(stored: torch.Tensor) -> str | None:
    """ValueCheck of anything else that is multiplied or added: finite."""
    return _described(stored, ~torch.isfinite(stored), "finite")


def not_negative(stored: torch.Tensor) -> str | None:
    """ValueCheck of a scale of eight bits, which may be so small that it became zero: finite and not below it."""
    values = stored.cpu().to(torch.float32)  # not every NPU can cast FP8
    return _described(values, ~(torch.isfinite(values) & (values >= 0)), "finite and at least zero")


def no_nan(stored: torch.Tensor) -> str | None:
    """ValueCheck of FP8 codes: no NaN."""
    bad = int(stored.cpu().to(torch.float32).isnan().sum())
    return f"{bad} of {stored.numel()} values are NaN" if bad else None


def no_nan_exponent(stored: torch.Tensor) -> str | None:
    """ValueCheck of E8M0 exponents: no NaN."""
    bad = int((stored == E8M0_NAN).sum())
    return f"{bad} of {stored.numel()} exponents are NaN ({E8M0_NAN})" if bad else None


def _described(values: torch.Tensor, bad: torch.Tensor, expected: str) -> str | None:
    if not bool(bad.any()):
        return None
    example = values[bad].reshape(-1)[0].item()
    return f"{int(bad.sum())} of {values.numel()} values are not {expected}, for example {example}"


def replace_parameter(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of a stored parameter, without gradient."""
    layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def tensor_of(layer: nn.Module, name: str) -> torch.Tensor:
    """A processed tensor of a layer, parameter or not; torch types it as `Tensor | Module`."""
    return cast(torch.Tensor, getattr(layer, name))
