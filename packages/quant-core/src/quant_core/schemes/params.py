"""Declared parameters: what is stored, how it is cut over ranks and fused with its neighbours.

Everything here is a pure function of sizes, so that the layouts of tensor parallelism are tested without an engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quant_core.errors import LimitError
from quant_core.schemes.context import LayerContext, Shard

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
        shared: all members of a fused layer store the same tensor. Without it, a parameter that has no `output_dim`
            has one entry per member, concatenated on axis 0.
        check: judges loaded values; not asked for dummy weights.
        dummy: the value that `load_format="dummy"` fills in, where a random one would make no sense.

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


@dataclass(frozen=True)
class ParamLayout:
    """One parameter of a fused and cut layer on one rank.

    Attributes:
        name: its canonical suffix.
        members: the declaration of each member, uncut.
        shape: the local, fused shape to allocate.
        axis: the axis along which members lie one after the other; None if they share one tensor.
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


def layout_of(name: str, members: Sequence[Param], context: LayerContext) -> ParamLayout:
    """How the declarations of all members become one local tensor.

    Raises:
        LimitError: if a cut would go through a packed value or a group.

    """
    first = members[0]
    parts = context.partition.input_parts
    shape = list(first.shape)
    if first.input_dim is not None and parts > 1:
        shape[first.input_dim] = _cut_input(name, first, parts, context)
    if first.shared:
        return ParamLayout(name, tuple(members), tuple(shape), None, (0,), parts)
    if first.output_dim is None:
        sizes = [member.shape[0] if member.shape else 1 for member in members]
        shape = [0, *shape[1:]]
        axis = 0
    else:
        axis = first.output_dim
        sizes = [_cut_output(name, m, s, context) for m, s in zip(members, context.shards, strict=True)]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    shape[axis] = offsets[-1]
    return ParamLayout(name, tuple(members), tuple(shape), axis, tuple(offsets), parts)


def _cut_output(name: str, param: Param, shard: Shard, context: LayerContext) -> int:
    """Local entries of one member along its output axis."""
    if shard.local_output_size % param.output_step:
        raise LimitError(
            f"{context.name}: {name} cannot be cut over {context.partition.size} tensor-parallel ranks",
            where=shard.name,
            found=f"{shard.local_output_size} output features on each rank",
            expected=f"a multiple of {param.output_step}, since one index stands for so many features",
            todo="use a smaller tensor_parallel_size",
        )
    return shard.local_output_size // param.output_step


def _cut_input(name: str, param: Param, parts: int, context: LayerContext) -> int:
    """Local entries along the input axis of a row-parallel layer."""
    assert param.input_dim is not None
    entries = param.shape[param.input_dim]
    if entries % parts or (context.input_size // parts) % param.input_step:
        works = [n for n in range(1, parts) if entries % n == 0]
        raise LimitError(
            f"{context.name}: {name} cannot be cut over {parts} tensor-parallel ranks",
            where=context.shards[0].name,
            found=f"{context.input_size} input features, {param.input_step} per index of {name}",
            expected="a cut between two groups",
            todo=f"use tensor_parallel_size {works[-1] if works else 1}",
        )
    return entries // parts


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
