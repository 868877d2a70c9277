"""A stack of modules under a leading axis, as experts are: declared, cut, filled, checked and reported as one is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import flatquant, w4a8_dynamic, w8a8, w8a8_dynamic, w8a16
from torch import Tensor, nn

from quant_core import LinearContext, LoadError, Param, Partition, Shard
from quant_core.schemes.filling import Filling
from quant_core.schemes.handover import check_shared, hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.linear.w4a4_flatquant_dynamic import AscendW4A4FlatQuantDynamicLinearMethod as FlatQuant
from quant_core.schemes.linear.w4a8_dynamic import AscendW4A8DynamicLinearMethod as Int4
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod as Static
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod as Dynamic
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod as WeightOnly
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.verify import check_values, linear_params, verify_stored

INPUTS, SIZES, DEPTH = 64, (16, 8), 4
MEMBERS = ("gate", "up")

TYPES = {
    "W8A8": (Static, w8a8),
    "W8A8_DYNAMIC": (Dynamic, w8a8_dynamic),
    "W8A16 groups": (WeightOnly, lambda out, inputs: w8a16(out, inputs, 4, asymmetric=True)),
    "W4A8_DYNAMIC": (Int4, lambda out, inputs: w4a8_dynamic(out, inputs, 4)),
    "W4A4_FLATQUANT_DYNAMIC": (FlatQuant, flatquant),
}

Stored = dict[str, Tensor]


def modules_of(kind: str) -> list[list[Stored]]:
    """The stored modules of each layer of a stack, gate before up."""
    make: Any = TYPES[kind][1]
    return [[make(size, INPUTS) for size in SIZES] for _ in range(DEPTH)]


def context_of(
    workbench: Any, kind: str, layers: list[list[Stored]], partition: Partition | None = None
) -> LinearContext:
    """The stack as one layer."""
    partition, scheme_class = partition or Partition(), TYPES[kind][0]
    parts = partition.size if partition.kind == "column" else 1
    names = tuple(tuple(f"experts.{i}.{member}" for member in MEMBERS) for i in range(len(layers)))
    forms = [
        workbench.form(name, member, scheme_class)
        for row, members in zip(names, layers, strict=True)
        for name, member in zip(row, members, strict=True)
    ]
    return LinearContext(
        name="experts",
        shards=tuple(Shard(n, size, size // parts) for n, size in zip(names[0], SIZES, strict=True)),
        input_size=INPUTS,
        params_dtype=torch.float32,
        stored=tuple(forms),
        partition=partition,
        stack=names,
    )


def one_of(context: LinearContext, index: int) -> LinearContext:
    """One layer of the stack by itself."""
    first = index * len(context.shards)
    shards = (replace(shard, name=name) for shard, name in zip(context.shards, context.stack[index], strict=True))
    stored = context.stored[first : first + len(context.shards)]
    return replace(context, shards=tuple(shards), stored=stored, stack=())


@pytest.mark.parametrize("partition", [Partition(), Partition("column", 1, 2), Partition("row", 1, 2)])
@pytest.mark.parametrize("kind", TYPES)
def test_it_holds_what_each_layer_by_itself_holds(workbench: Any, kind: str, partition: Partition) -> None:
    """Declared, verified, cut and filled by the same functions; the layers of a stack are its slices."""
    layers, scheme_class = modules_of(kind), TYPES[kind][0]
    context = context_of(workbench, kind, layers, partition)
    scheme = scheme_class.create(context)
    verify_stored(scheme)
    stacked = workbench.load(scheme, [member for members in layers for member in members])
    for index, members in enumerate(layers):
        alone = workbench.load(scheme_class.create(one_of(context, index)), members)
        assert dict(stacked.named_parameters()).keys() == dict(alone.named_parameters()).keys()
        for name, value in alone.named_parameters():
            assert torch.equal(stacked.get_parameter(name)[index], value), name


@pytest.mark.parametrize("partition", [Partition(), Partition("column", 1, 2)])
def test_what_holds_for_several_rows_is_handed_over_for_each(partition: Partition) -> None:
    """Values of whole members, and blocks of 4 rows, of which the last one of a member may be partial."""
    sizes, cut = (8, 16) if partition.size == 2 else (6, 9), partition.size
    names = tuple(tuple(f"experts.{i}.{member}" for member in MEMBERS) for i in range(DEPTH))
    shards = tuple(Shard(name, size, size // cut) for name, size in zip(names[0], sizes, strict=True))
    for depth in (DEPTH, 0):
        context = LinearContext(
            name="experts",
            shards=shards,
            input_size=INPUTS,
            params_dtype=torch.float32,
            partition=partition,
            stack=names[:depth],
        )
        declared = {
            "one": [Param((), torch.float32, per_row=True) for _ in sizes],
            "blocks": [Param((-(-s // 4), 3), torch.float32, output_dim=0, output_step=4, per_row=True) for s in sizes],
        }
        layouts, holder = layouts_of(declared, context), nn.Module()
        for name, layout in layouts.items():
            replace_parameter(holder, name, torch.rand(layout.shape))
        held = {
            name: param.data.view(depth or 1, *param.shape[depth > 0 :]) for name, param in holder.named_parameters()
        }
        hand_over(holder, layouts.values(), [])
        for index in range(depth or 1):
            start, first = 0, 0
            for member, shard in enumerate(shards):
                for row in range(shard.local_output_size):
                    found = {
                        name: param.data[index] if depth else param.data for name, param in holder.named_parameters()
                    }
                    assert torch.equal(found["one"][start + row], held["one"][index, member][None])
                    assert torch.equal(found["blocks"][start + row], held["blocks"][index, first + row // 4])
                start, first = start + shard.local_output_size, first + -(-shard.local_output_size // 4)


def test_a_wrong_module_of_the_stack_is_named(workbench: Any) -> None:
    layers = modules_of("W8A8_DYNAMIC")
    del layers[2][1]["weight_scale"]
    layers[3][0]["weight"] = layers[3][0]["weight"][:, :32]
    with pytest.raises(LoadError) as raised:
        verify_stored(Dynamic.create(context_of(workbench, "W8A8_DYNAMIC", layers)))
    message = str(raised.value)
    assert "experts.2.up.weight_scale is absent, expected float32 [8, 1]" in message
    assert "experts.3.gate.weight in model.safetensors is int8 [16, 32], expected int8 [16, 64]" in message
    assert "experts.0" not in message


def test_what_was_not_loaded_is_reported(workbench: Any) -> None:
    layers = modules_of("W8A8_DYNAMIC")
    scheme = Dynamic.create(context_of(workbench, "W8A8_DYNAMIC", layers))
    layout = layouts_of(linear_params(scheme), scheme.context)["weight"]
    assert layout.shape == (DEPTH, sum(SIZES), INPUTS)
    filling, data = Filling(layout, "experts", scheme.context.modules), torch.zeros(layout.shape, dtype=torch.int8)
    for layer, member in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 1)):
        filling.load(data, layers[layer][member]["weight"], member, layer)
    assert filling.missing() == ["experts.1.up", "experts.3.gate"]
    with pytest.raises(LoadError, match=r"experts: weight of member 0 of layer 1 of the stack does not fit"):
        filling.load(data, torch.zeros(9, INPUTS, dtype=torch.int8), 0, 1)


def test_values_are_judged_module_by_module(workbench: Any) -> None:
    layers = modules_of("W8A8_DYNAMIC")
    layers[2][1]["weight_scale"][3] = float("nan")
    scheme = Dynamic.create(context_of(workbench, "W8A8_DYNAMIC", layers))
    layer = workbench.load(scheme, [member for members in layers for member in members])
    layouts = layouts_of(linear_params(scheme), scheme.context)
    filling = Filling(layouts["weight_scale"], "experts", scheme.context.modules)
    wrong = []
    for module, part in filling.parts(layer.weight_scale.data):
        try:
            check_values("experts", [f"{module}.weight_scale"], layouts["weight_scale"].param, part)
        except LoadError as error:
            wrong.append((module, "1 of 8 values are not finite and positive" in str(error)))
    assert wrong == [("experts.2.up", True)]


def test_what_members_share_is_compared_within_each_layer(workbench: Any) -> None:
    """Each layer of a stack may have another transform; its members have the same."""
    layers = modules_of("W4A4_FLATQUANT_DYNAMIC")
    for index, members in enumerate(layers):
        for member in members:
            member["left_trans"] = member["left_trans"] * (index + 1)
    scheme = FlatQuant.create(context_of(workbench, "W4A4_FLATQUANT_DYNAMIC", layers))
    layout = layouts_of(linear_params(scheme), scheme.context)["left_trans"]
    assert layout.shape == (DEPTH, len(MEMBERS), 8, 8)
    data = torch.stack([torch.stack([member["left_trans"] for member in members]) for members in layers])
    check_shared(scheme.context, "left_trans", data)
    holder = nn.Module()
    replace_parameter(holder, "left_trans", data)
    hand_over(holder, [layout], [])
    assert torch.equal(holder.get_parameter("left_trans"), data[:, 0])
    data[2, 1, 0, 0] += 1
    with pytest.raises(LoadError, match=r"found: experts.2.up.left_trans\n"):
        check_shared(scheme.context, "left_trans", data)
