"""How declared parameters are cut over ranks, fused with their neighbours and stacked, and how they are filled.

Everything here is a pure function of sizes, so that the layouts of tensor parallelism are tested without an engine.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quant_core.errors import LimitError, listing
from quant_core.schemes.context import LinearContext, Shard
from quant_core.schemes.params import Param


@dataclass(frozen=True)
class ParamLayout:
    """One parameter of a fused and cut layer, or of a stack of them, on one rank.

    Attributes:
        name: its canonical suffix.
        members: the declaration of each member, uncut.
        shape: the local, fused shape to allocate; a stack has one more axis in front.
        axis: the axis of one layer's part along which members lie one after the other; None if they share one tensor,
            whose copies lie side by side on a new first axis until they have been compared.
        offsets: where each member starts on `axis`, and last the end of all.
        input_parts: into how many parts `input_dim` is cut.
        depth: how many layers a stack has; None for a layer by itself.
        rows: the output features of each member on this rank.

    """

    name: str
    members: tuple[Param, ...]
    shape: tuple[int, ...]
    axis: int | None
    offsets: tuple[int, ...]
    input_parts: int
    depth: int | None = None
    rows: tuple[int, ...] = ()

    @property
    def param(self) -> Param:
        """What holds for every member: axes, steps, dtype."""
        return self.members[0]

    def member(self, index: int) -> slice:
        """The part of `axis` that belongs to member `index`."""
        return slice(self.offsets[index], self.offsets[index + 1])

    def part(self, data: Tensor, member: int, layer: int = 0) -> Tensor:
        """The part of a tensor of this layout that belongs to one member (of one layer of a stack), as a view."""
        of_layer = data if self.depth is None else data[layer]
        if self.axis is None:
            return of_layer[member]
        where = self.member(member)
        return of_layer.narrow(self.axis, where.start, where.stop - where.start)

    def cut(self, loaded: Tensor, member: int, output_part: int, input_part: int) -> Tensor:
        """What of a member's stored tensor belongs on this rank, as a view.

        Args:
            loaded: as the declaration of the member has it.
            member: which one.
            output_part: of equal parts of the output features, this rank's; 0 where they are not cut.
            input_part: the same of the input features.

        """
        param = self.param
        if param.output_dim is not None and self.axis is not None:
            where = self.member(member)
            size = where.stop - where.start
            loaded = loaded.narrow(param.output_dim, output_part * size, size)
        if param.input_dim is not None and self.input_parts > 1:
            size = loaded.shape[param.input_dim] // self.input_parts
            loaded = loaded.narrow(param.input_dim, input_part * size, size)
        return loaded


def layouts_of(declared: Mapping[str, Sequence[Param]], context: LinearContext) -> dict[str, ParamLayout]:
    """How each parameter of a layer, given the declarations of all members, becomes one local tensor.

    Raises:
        LimitError: if a cut would go through a packed value or a group; names a tensor_parallel_size that works.

    """
    every = list(declared.values())
    return {name: _layout(name, members, context, every) for name, members in declared.items()}


def layout_of(name: str, members: Sequence[Param], context: LinearContext) -> ParamLayout:
    """The same for one parameter, whose error then considers no other.

    Raises:
        LimitError: if a cut would go through a packed value or a group.

    """
    return _layout(name, members, context, [members])


def _layout(
    name: str, members: Sequence[Param], context: LinearContext, every: Sequence[Sequence[Param]]
) -> ParamLayout:
    first, partition = members[0], context.partition
    parts = partition.input_parts
    uncut = [s for m, s in zip(members, context.shards, strict=True) if _goes_through(m, s)]
    if not _divides(first, parts, context.input_size):
        raise _indivisible(name, f"{context.input_size} input features", first.input_step, context, every)
    if first.output_dim is not None and uncut:
        size = f"{uncut[0].local_output_size} of {uncut[0].output_size} output features of {uncut[0].name} on this rank"
        raise _indivisible(name, size, first.output_step, context, every)
    shape = list(first.shape)
    if first.input_dim is not None:
        shape[first.input_dim] //= parts
    depth = len(context.stack) or None
    stacked = () if depth is None else (depth,)
    if first.shared:
        return ParamLayout(name, tuple(members), (*stacked, len(members), *shape), None, (0,), parts, depth)
    if first.output_dim is None:
        axis = 0
        shape = shape or [1]  # a scalar becomes an entry
        sizes = [shape[0]] * len(members)
    else:
        axis = first.output_dim
        sizes = [-(-s.local_output_size // m.output_step) for m, s in zip(members, context.shards, strict=True)]
    offsets = [0, *itertools.accumulate(sizes)]
    shape[axis] = offsets[-1]
    rows = tuple(shard.local_output_size for shard in context.shards)
    return ParamLayout(name, tuple(members), (*stacked, *shape), axis, tuple(offsets), parts, depth, rows)


def _goes_through(param: Param, shard: Shard) -> bool:
    """Whether this rank's output features end within an index, other than where those of the whole member do."""
    whole = shard.local_output_size == shard.output_size and _holds(param, shard)
    return not whole and shard.local_output_size % param.output_step > 0


def _holds(param: Param, shard: Shard) -> bool:
    """Whether there is an index for every output feature of a member: the last one may stand for fewer."""
    return param.output_dim is not None and param.shape[param.output_dim] * param.output_step >= shard.output_size


def _divides(param: Param, parts: int, input_size: int) -> bool:
    """Whether the input features can be cut into so many parts between two groups."""
    if param.input_dim is None or parts == 1:
        return True
    entries = param.shape[param.input_dim]
    return entries % parts == 0 and (input_size // parts) % param.input_step == 0


def _indivisible(
    name: str, size: str, step: int, context: LinearContext, every: Sequence[Sequence[Param]]
) -> LimitError:
    works = [n for n in range(context.partition.size - 1, 0, -1) if _works(n, context, every)]
    others = f" ({listing(works[1:])} would fit as well)" if works[1:] else ""
    return LimitError(
        f"{context.name}: {name} cannot be cut over {context.partition.size} tensor-parallel ranks",
        where=", ".join(shard.name for shard in context.shards),
        found=size,
        expected=f"equal parts that are multiples of {step}: one index of {name} stands for so many features",
        todo=f"use tensor_parallel_size {works[0]}{others}" if works else "no tensor_parallel_size cuts this layer",
    )


def _works(size: int, context: LinearContext, every: Sequence[Sequence[Param]]) -> bool:
    """Whether the layer's parameters can be cut over `size` ranks."""
    partition = replace(context.partition, size=size)
    output_parts = size if partition.kind == "column" else 1
    pairs = [pair for members in every for pair in zip(members, context.shards, strict=True)]
    return all(_divides(m, partition.input_parts, context.input_size) for m, _ in pairs) and all(
        s.output_size % (output_parts * m.output_step) == 0 or (output_parts == 1 and _holds(m, s))
        for m, s in pairs
        if m.output_dim is not None
    )
