"""Declared parameters: what is stored, how it is cut over ranks and fused with its neighbours.

Everything here is a pure function of sizes, so that the layouts of tensor parallelism are tested without an engine.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from quant_core.errors import LimitError
from quant_core.schemes.context import LayerContext

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
        output_step: output features per index of `output_dim` (2 for int4 pairs).
        input_step: input features per index of `input_dim` (the group size for a group's scale).
        shared: all members of a fused layer store the same tensor, and the scheme is handed one of them. Without it, a
            parameter that has no `output_dim` has one entry per member, concatenated on axis 0.
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


@dataclass(frozen=True)
class ParamLayout:
    """One parameter of a fused and cut layer on one rank.

    Attributes:
        name: its canonical suffix.
        members: the declaration of each member, uncut.
        shape: the local, fused shape to allocate.
        axis: the axis along which members lie one after the other; None if they share one tensor, whose copies are then
            stacked on a new first axis: an engine counts what it loads.
        offsets: where each member starts on `axis`, and last the end of all.
        input_parts: into how many parts `input_dim` is cut.

    """

    name: str
    members: tuple[Param, ...]
    shape: tuple[int, ...]
    axis: int | None
    offsets: tuple[int, ...]
    input_parts: int

    @property
    def param(self) -> Param:
        """What holds for every member: axes, steps, dtype."""
        return self.members[0]

    def member(self, index: int) -> slice:
        """The part of `axis` that belongs to member `index`."""
        return slice(self.offsets[index], self.offsets[index + 1])


def layouts_of(declared: Mapping[str, Sequence[Param]], context: LayerContext) -> dict[str, ParamLayout]:
    """How each parameter of a layer, given the declarations of all members, becomes one local tensor.

    Raises:
        LimitError: if a cut would go through a packed value or a group; names a tensor_parallel_size that works.

    """
    every = list(declared.values())
    return {name: _layout(name, members, context, every) for name, members in declared.items()}


def layout_of(name: str, members: Sequence[Param], context: LayerContext) -> ParamLayout:
    """The same for one parameter, whose error then considers no other.

    Raises:
        LimitError: if a cut would go through a packed value or a group.

    """
    return _layout(name, members, context, [members])


def _layout(
    name: str, members: Sequence[Param], context: LayerContext, every: Sequence[Sequence[Param]]
) -> ParamLayout:
    first, partition = members[0], context.partition
    parts = partition.input_parts
    uncut = [s for m, s in zip(members, context.shards, strict=True) if s.local_output_size % m.output_step]
    if not _divides(first, parts, context.input_size):
        raise _indivisible(name, f"{context.input_size} input features", first.input_step, context, every)
    if first.output_dim is not None and uncut:
        size = f"{uncut[0].local_output_size} of {uncut[0].output_size} output features of {uncut[0].name} on this rank"
        raise _indivisible(name, size, first.output_step, context, every)
    shape = list(first.shape)
    if first.input_dim is not None:
        shape[first.input_dim] //= parts
    if first.shared:
        return ParamLayout(name, tuple(members), (len(members), *shape), None, (0,), parts)
    if first.output_dim is None:
        axis = 0
        shape = shape or [1]  # a scalar becomes an entry
        sizes = [shape[0]] * len(members)
    else:
        axis = first.output_dim
        sizes = [s.local_output_size // m.output_step for m, s in zip(members, context.shards, strict=True)]
    offsets = [0, *itertools.accumulate(sizes)]
    shape[axis] = offsets[-1]
    return ParamLayout(name, tuple(members), tuple(shape), axis, tuple(offsets), parts)


def _divides(param: Param, parts: int, input_size: int) -> bool:
    """Whether the input features can be cut into so many parts between two groups."""
    if param.input_dim is None or parts == 1:
        return True
    entries = param.shape[param.input_dim]
    return entries % parts == 0 and (input_size // parts) % param.input_step == 0


def _indivisible(
    name: str, size: str, step: int, context: LayerContext, every: Sequence[Sequence[Param]]
) -> LimitError:
    works = [n for n in range(1, context.partition.size) if _works(n, context, every)]
    return LimitError(
        f"{context.name}: {name} cannot be cut over {context.partition.size} tensor-parallel ranks",
        where=", ".join(shard.name for shard in context.shards),
        found=size,
        expected=f"equal parts that are multiples of {step}: one index of {name} stands for so many features",
        todo=f"use tensor_parallel_size {works[-1]}" if works else "no tensor_parallel_size cuts this layer",
    )


def _works(size: int, context: LayerContext, every: Sequence[Sequence[Param]]) -> bool:
    """Whether the layer's parameters can be cut over `size` ranks."""
    partition = replace(context.partition, size=size)
    output_parts = size if partition.kind == "column" else 1
    pairs = [pair for members in every for pair in zip(members, context.shards, strict=True)]
    return all(_divides(m, partition.input_parts, context.input_size) for m, _ in pairs) and all(
        s.output_size % (output_parts * m.output_step) == 0 for m, s in pairs if m.output_dim is not None
    )


def same_kind(params: Sequence[Param]) -> bool:
    """Whether the declarations of all members differ in nothing but the number of output features."""

    def kind(param: Param) -> Param:
        shape = list(param.shape)
        if param.output_dim is not None:
            shape[param.output_dim] = -1
        return replace(param, shape=tuple(shape))

    return len({kind(param) for param in params}) <= 1


def float_values(stored: torch.Tensor) -> torch.Tensor:
    """A stored scale as float32: int64 holds the bits of a float32 in its low half (formats/modelslim.md, 4.1)."""
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
