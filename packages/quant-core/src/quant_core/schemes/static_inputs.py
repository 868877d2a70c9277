"""Inputs that are quantised with stored scales, of which each member of a fused layer may have its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import float_values, replace_parameter, tensor_of


class StaticInputs:
    """Which members of a layer are multiplied at once: neighbours that share an input scale and zero point, a run.

    Attributes:
        context: the layer.
        runs: the output features of each run on this rank, once `merge` has seen values.

    """

    def __init__(self, context: LinearContext) -> None:
        self.context = context
        self.runs: tuple[tuple[int, int], ...] = ()

    def merge(self, layer: nn.Module) -> None:
        """`input_scale` and `input_offset`, where there is one, of the members become float32 [runs].

        Made-up scales say nothing about the real ones: each member is a run of its own then.

        Raises:
            LimitError: if a reload would change the runs, which compiled code has baked in.

        """
        held = {n: float_values(p.data) for n, p in layer.named_parameters() if n in ("input_scale", "input_offset")}
        members = torch.stack(list(held.values()), dim=1)
        differ = (members[1:] != members[:-1]).any(dim=1) | self.context.values_later
        firsts = [0, *(differ.nonzero().flatten() + 1).tolist()]
        ends = [0]
        for shard in self.context.shards:
            ends.append(ends[-1] + shard.local_output_size)
        runs = tuple((ends[a], ends[b]) for a, b in zip(firsts, [*firsts[1:], len(self.context.shards)], strict=True))
        if self.runs not in ((), runs):
            raise LimitError(
                f"{self.context.name}: the reloaded weights share their input scales among other members than before",
                found=f"rows {runs}",
                expected=f"rows {self.runs}",
                todo="start the engine anew with these weights",
            )
        self.runs = runs
        for name, values in held.items():
            replace_parameter(layer, name, values[firsts])

    def of_rows(self, members: Tensor) -> Tensor:
        """One value per member as one per output feature of this rank."""
        counts = [shard.local_output_size for shard in self.context.shards]
        return members.repeat_interleave(torch.tensor(counts, device=members.device))

    def product(self, layer: nn.Module, rows: Tensor, multiply: Callable[[Tensor, slice | None], Tensor]) -> Tensor:
        """Quantise and multiply once for each run.

        Args:
            layer: holds what `merge` made.
            rows: [tokens, in].
            multiply: int8 codes [tokens, in] with the output features of a run; None stands for all.

        Returns:
            [tokens, out].

        """
        scale, offset = tensor_of(layer, "input_scale"), getattr(layer, "input_offset", None)
        if len(self.runs) == 1:  # the usual case, for which slices would take longer than all the rest
            return multiply(torch.ops.npu.npu_quantize(rows, scale, offset, torch.qint8, -1, True), None)
        parts = []
        for run, (start, stop) in enumerate(self.runs):
            own = slice(run, run + 1)
            zero_point = None if offset is None else offset[own]
            codes = torch.ops.npu.npu_quantize(rows, scale[own], zero_point, torch.qint8, -1, True)
            parts.append(multiply(codes, slice(start, stop)))
        return torch.cat(parts, dim=-1)
