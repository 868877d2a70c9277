"""What stands between stored tensors and a linear layer that can be applied; an engine in the small."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant_core import AscendLinearScheme, LayerContext, Partition, Shard, StoredForm, StoredTensor
from quant_core.schemes.handover import hand_over
from quant_core.schemes.params import Param, layouts_of, replace_parameter
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
    ) -> LayerContext:
        """A layer that is fused from stored modules.

        Without sizes it is as large as their weights, or, where a scheme class tells how those are packed, larger.
        """
        partition = partition or Partition()
        parts = partition.size if partition.kind == "column" else 1
        stored = tuple(self.form(f"m{i}", member) for i, member in enumerate(members))
        told = [scheme_class.stored_sizes(form) if scheme_class else None for form in stored]
        shapes = [size or tuple(m["weight"].shape)[::-1] for size, m in zip(told, members, strict=True)]
        sizes = sizes or [output for _, output in shapes]
        return LayerContext(
            name="layers.0.proj",
            layer_type="linear",
            shards=tuple(Shard(f"m{i}", size, size // parts) for i, size in enumerate(sizes)),
            input_size=inputs or shapes[0][0],
            params_dtype=dtype,
            stored=stored,
            partition=partition,
            **options,
        )

    def form(self, module: str, member: Stored) -> StoredForm:
        """What the header of a file with these tensors says."""
        return StoredForm(
            module,
            {s: StoredTensor(f"{module}.{s}", tuple(t.shape), t.dtype, "model.safetensors") for s, t in member.items()},
        )

    def draw(self, scheme_class: type[AscendLinearScheme], size: int, inputs: int) -> Stored:
        """A stored module of any type: as the type itself quantises, or random values that its declarations accept."""
        shard = Shard("m0", size, size)
        scheme = scheme_class.create(LayerContext("layers.0.proj", "linear", (shard,), inputs, torch.bfloat16))
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
        layer, partition = nn.Module(), scheme.context.partition
        layouts = layouts_of(linear_params(scheme), scheme.context)
        for name, layout in layouts.items():
            value, written = torch.zeros(layout.shape, dtype=layout.param.dtype), torch.zeros(layout.shape)
            for index, (member, param) in enumerate(zip(members, layout.members, strict=True)):
                part = member[name]
                assert tuple(part.shape) == param.shape, f"{name} is declared otherwise"
                assert param.takes(part.dtype), f"{name} is declared otherwise"
                where: list[Any] = [slice(None)] * value.dim()
                where[layout.axis or 0] = index if layout.axis is None else layout.member(index)
                if param.output_dim is not None and partition.kind == "column":
                    part = part.chunk(partition.size, param.output_dim)[partition.rank]
                if param.input_dim is not None and partition.kind == "row":
                    part = part.chunk(partition.size, param.input_dim)[partition.rank]
                value[tuple(where)] = part
                written[tuple(where)] += 1
            assert bool((written == 1).all()), f"{name}: the members do not fill it"
            replace_parameter(layer, name, value)
        hand_over(layer, layouts.values(), layouts_of(absent_params(scheme), scheme.context).values())
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
