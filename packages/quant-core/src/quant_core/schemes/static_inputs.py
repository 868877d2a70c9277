"""Inputs that are quantised with stored scales: one for each member of a fused layer, one for each expert."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import float_values, replace_parameter, tensor_of


class InputRuns:
    """Neighbouring members of a fused layer whose input is quantised alike, and which are multiplied at once.

    Attributes:
        context: the layer.
        features: the output features of each run on this rank, once `merge` has seen values.

    """

    def __init__(self, context: LinearContext) -> None:
        self.context = context
        self.features: tuple[slice, ...] = ()

    def merge(self, layer: nn.Module, *names: str) -> None:
        """Parameters with one stored value of each member become float32 [runs]; those that are absent are left out.

        Made-up values say nothing about the real ones: each member is a run of its own then.

        Raises:
            LimitError: if a reload would change the runs, which compiled code has baked in.

        """
        held = {name: float_values(tensor_of(layer, name).data) for name in names if hasattr(layer, name)}
        members = torch.stack(list(held.values()), dim=1)
        differ = (members[1:] != members[:-1]).any(dim=1) | self.context.values_later
        firsts = [0, *(differ.nonzero().flatten() + 1).tolist()]
        ends = [0]
        for shard in self.context.shards:
            ends.append(ends[-1] + shard.local_output_size)
        bounds = [ends[first] for first in [*firsts, len(self.context.shards)]]
        features = tuple(slice(*pair) for pair in itertools.pairwise(bounds))
        if self.features not in ((), features):
            raise LimitError(
                f"{self.context.name}: the reloaded weights share their input scales among other members than before",
                found=f"rows {[(run.start, run.stop) for run in features]}",
                expected=f"rows {[(run.start, run.stop) for run in self.features]}",
                todo="start the engine anew with these weights",
            )
        self.features = features
        for name, values in held.items():
            replace_parameter(layer, name, values[firsts])

    def of_rows(self, members: Tensor) -> Tensor:
        """One value per member as one per output feature of this rank."""
        counts = [shard.local_output_size for shard in self.context.shards]
        return members.repeat_interleave(torch.tensor(counts, device=members.device))

    def product(self, multiply: Callable[[slice | None, slice | None], Tensor]) -> Tensor:
        """The products of all runs, side by side.

        Args:
            multiply: is told the place of a run among the runs, and its output features; None stands for all, in the
                usual case of one run, for which slices would take longer than all the rest.

        """
        if len(self.features) == 1:
            return multiply(None, None)
        return torch.cat([multiply(slice(run, run + 1), own) for run, own in enumerate(self.features)], dim=-1)


def part(values: Tensor, where: slice | None) -> Tensor:
    """A part of the first axis; None stands for all."""
    return values if where is None else values[where]


def one_input_scale(linear: AscendLinearScheme, module: nn.Module, *names: str) -> None:
    """Of an expert's projection, what is stored of its input as single values, so that a stack has one of each expert.

    Raises:
        LimitError: if gate and up have input scales of their own, though their input is the same.

    """
    for name in [name for name in names if hasattr(module, name)]:
        values = tensor_of(module, name)
        if len(values) > 1:
            raise LimitError(
                f"{linear.context.name}: gate and up of an expert have different input scales",
                where=" and ".join(f"{module}.{name}" for modules in linear.context.modules for module in modules),
                found=values.tolist(),
                expected="one, since they are multiplied at once",
                todo="quantise them with common activations, or with scales that are found at run time",
            )
        replace_parameter(module, name, values[0])


def of_each_row(values: Tensor, counts: Tensor, rows: int) -> Tensor:
    """Values of the experts [E] as those of their rows [rows]; what lies behind the last expert's takes that one's."""
    places = torch.arange(rows, device=values.device)
    return values[torch.searchsorted(counts.cumsum(0), places, right=True).clamp(max=len(counts) - 1)]
