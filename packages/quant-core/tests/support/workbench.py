"""What stands between stored tensors and a linear layer that can be applied; an engine in the small."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from stating import form
from torch import Tensor, nn

from quant_core import AscendLinearScheme, LinearContext, Partition, Shard, StoredForm
from quant_core.schemes.filling import Filling
from quant_core.schemes.handover import hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import Param, replace_parameter
from quant_core.schemes.verify import absent_params, linear_params

#: One checkpoint module: its stored tensors by suffix.
Stored = Mapping[str, Tensor]


class Workbench:
    """Allocates, cuts and fuses what a scheme declares, as an engine does, and lets the scheme process it."""

    def context(
        self,
        members: Sequence[Stored],
        dtype: torch.dtype = torch.float32,
        partition: Partition | None = None,
        sizes: Sequence[int] = (),
        inputs: int = 0,
        scheme_class: type[AscendLinearScheme] | None = None,
        **options: Any,
    ) -> LinearContext:
        """A layer that is fused from stored modules; without sizes as large as their weights, as stated, are."""
        partition = partition or Partition()
        parts = partition.size if partition.kind == "column" else 1
        stored = tuple(form(f"m{i}", member, scheme_class, inputs) for i, member in enumerate(members))
        told = [found.sizes() or (1, 1) for found in stored]
        sizes = sizes or [output for _, output in told]
        return LinearContext(
            name="layers.0.proj",
            shards=tuple(Shard(f"m{i}", size, size // parts) for i, size in enumerate(sizes)),
            input_size=inputs or told[0][0],
            params_dtype=dtype,
            stored=stored,
            partition=partition,
            **options,
        )

    def form(
        self, module: str, member: Stored, scheme_class: type[AscendLinearScheme] | None = None, inputs: int = 0
    ) -> StoredForm:
        """What a format states of a module with these tensors."""
        return form(module, member, scheme_class, inputs)

    def draw(self, scheme_class: type[AscendLinearScheme], size: int, inputs: int) -> Stored:
        """A stored module of any type: as the type itself quantises, or random values that its declarations accept."""
        shard = Shard("m0", size, size)
        context = LinearContext(name="layers.0.proj", shards=(shard,), input_size=inputs, params_dtype=torch.bfloat16)
        scheme = scheme_class.create(context)
        assert scheme_class.can_serve(scheme.context) == []
        try:
            return scheme.quantize(torch.randn(size, inputs) / 100)
        except NotImplementedError:
            return {name: self.values(name, param) for name, param in scheme.params(inputs, size).items()}

    def values(self, name: str, param: Param) -> Tensor:
        """Random values for one declaration, or constant ones if its check wants them."""
        floats = torch.rand(param.shape) / 100 + 1e-3
        if param.dtype.is_floating_point:
            random = floats.to(param.dtype)
        elif param.dtype == torch.int64:  # the bits of a float32
            random = floats.view(torch.int32).to(torch.int64)
        else:
            limits = torch.iinfo(param.dtype)
            random = torch.randint(limits.min, limits.max + 1, param.shape, dtype=torch.int64).to(param.dtype)
        constants = [torch.full(param.shape, fill).to(param.dtype) for fill in (0, 1, param.dummy or 0)]
        accepted = [value for value in (random, *constants) if param.check is None or param.check(value) is None]
        assert accepted, f"no value that {name} accepts: a case of this type has to be written by hand"
        return accepted[0]

    def load(self, scheme: AscendLinearScheme, members: Sequence[Stored]) -> nn.Module:
        """A layer that holds this rank's part of the stored tensors, every element of it written exactly once."""
        layer, context = nn.Module(), scheme.context
        kind, rank = context.partition.kind, context.partition.rank
        layouts = layouts_of(linear_params(scheme), context)
        for name, layout in layouts.items():
            value, written = torch.zeros(layout.shape, dtype=layout.param.dtype), torch.zeros(layout.shape)
            filling = Filling(layout, context.name, context.modules)
            for index, member in enumerate(members):
                at = {"layer": index // len(context.shards), "member": index % len(context.shards)}
                parts = {"output_part": rank if kind == "column" else 0, "input_part": rank if kind == "row" else 0}
                filling.load(value, member[name], **at, **parts)
                layout.part(written, at["member"], at["layer"]).add_(1)
            assert bool((written == 1).all()), f"{name}: the members do not fill it"
            assert filling.missing() == []
            replace_parameter(layer, name, value)
        hand_over(layer, layouts.values(), layouts_of(absent_params(scheme), context).values())
        return layer

    def serve(
        self, scheme_class: type[AscendLinearScheme], members: Sequence[Stored], **options: Any
    ) -> tuple[AscendLinearScheme, nn.Module]:
        """A scheme and its processed layer; options are those of `context`."""
        scheme = scheme_class.create(self.context(members, scheme_class=scheme_class, **options))
        layer = self.load(scheme, members)
        scheme.process_weights_after_loading(layer)
        return scheme, layer

    def run_ranks(
        self,
        scheme_class: type[AscendLinearScheme],
        members: Sequence[Stored],
        x: Tensor,
        kind: str,
        size: int,
        **options: Any,
    ) -> Tensor:
        """The layer's output over all ranks: members side by side (column), or the sum (row)."""
        outputs = []
        for rank in range(size):
            scheme, layer = self.serve(scheme_class, members, partition=Partition(kind, rank, size), **options)
            part = x.chunk(size, -1)[rank] if kind == "row" else x
            local = [shard.local_output_size for shard in scheme.context.shards]
            outputs.append(scheme.apply(layer, part, tp_rank=rank).split(local, -1))
        fused = [torch.cat(member, -1) if kind == "column" else sum(member) for member in zip(*outputs, strict=True)]
        return torch.cat(fused, -1)
