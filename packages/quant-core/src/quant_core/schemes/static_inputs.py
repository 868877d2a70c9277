"""Scales of a layer's input that are stored: one for each member of a fused layer, one for each expert."""

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import float_values, replace_parameter, tensor_of


class InputRuns:
    """Neighbouring members of a fused layer whose input is quantised alike, and which are multiplied at once.

    Attributes:
        rows: the output features of each run: where it starts, and its end.

    """

    def __init__(self, context: LinearContext) -> None:
        self.context = context
        self.rows: tuple[slice, ...] = ()

    def find(self, scales: Tensor) -> Tensor:
        """The scale of each run, given those of the members [members].

        Made-up scales say nothing about the real ones: each member is a run of its own then.

        Raises:
            LimitError: if a reload would change the runs, which compiled code has baked in.

        """
        differ = (scales[1:] != scales[:-1]) | self.context.values_later
        firsts = [0, *(differ.nonzero().flatten() + 1).tolist()]
        ends = [0]
        for shard in self.context.shards:
            ends.append(ends[-1] + shard.local_output_size)
        rows = tuple(
            slice(ends[a], ends[b]) for a, b in zip(firsts, [*firsts[1:], len(self.context.shards)], strict=True)
        )
        if self.rows not in ((), rows):
            raise LimitError(
                f"{self.context.name}: the reloaded weights share their input scales among other members than before",
                found=f"rows {[(run.start, run.stop) for run in rows]}",
                expected=f"rows {[(run.start, run.stop) for run in self.rows]}",
                todo="start the engine anew with these weights",
            )
        self.rows = rows
        return scales[firsts]


def process_input_scale(layer: nn.Module, name: str, runs: InputRuns) -> None:
    """Stored input scales of the members become float32 ones of the runs."""
    replace_parameter(layer, name, runs.find(float_values(layer.get_parameter(name).data)))


def one_input_scale(linear: AscendLinearScheme, module: nn.Module, name: str) -> None:
    """Of an expert's projection, the input scale as a single value, so that a stack has one for each expert.

    Raises:
        LimitError: if gate and up have input scales of their own, though their input is the same.

    """
    scales = tensor_of(module, name)
    if len(scales) > 1:
        raise LimitError(
            f"{linear.context.name}: gate and up of an expert have different input scales",
            where=" and ".join(f"{module}.{name}" for modules in linear.context.modules for module in modules),
            found=scales.tolist(),
            expected="one, since they are multiplied at once",
            todo="quantise them with common activations, or with scales that are found at run time",
        )
    replace_parameter(module, name, scales[0])


def of_each_row(scales: Tensor, counts: Tensor, rows: int) -> Tensor:
    """Scales of the experts [E] as those of their rows [rows]; what lies behind the last expert's takes that one's."""
    places = torch.arange(rows, device=scales.device)
    return scales[torch.searchsorted(counts.cumsum(0), places, right=True).clamp(max=len(counts) - 1)]
