"""Declared parameters: cutting and fusing as pure functions, value checks."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant_core import LimitError, LinearContext, Param, Partition, Shard
from quant_core.schemes import params
from quant_core.schemes.layouts import layout_of, layouts_of
from quant_core.schemes.params import replace_parameter, same_kind, tensor_of


def context(
    outputs: tuple[int, ...], inputs: int, kind: str = "replicated", rank: int = 0, size: int = 1
) -> LinearContext:
    """A layer of so many members, cut evenly."""
    parts = size if kind == "column" else 1
    shards = tuple(Shard(f"m{i}", output, output // parts) for i, output in enumerate(outputs))
    return LinearContext(
        name="layer",
        shards=shards,
        input_size=inputs,
        params_dtype=torch.float32,
        partition=Partition(kind, rank, size),
    )


def declarations(output: int, inputs: int, group: int, pack: int) -> dict[str, Param]:
    """All kinds of parameter that a module can have."""
    f32, groups = torch.float32, inputs // group
    return {
        "weight": Param((output // pack, inputs), torch.uint8, output_dim=0, input_dim=1, output_step=pack),
        "transposed": Param((inputs, output), torch.int8, output_dim=1, input_dim=0),
        "scale": Param((output, 1), f32, output_dim=0),
        "group_scale": Param((output, groups), f32, output_dim=0, input_dim=1, input_step=group),
        "input_scale": Param((1,), f32),
        "scalar": Param((), f32),
        "smooth": Param((inputs,), f32, input_dim=0),
        "rotation": Param((4, 4), f32, shared=True),
        "shared_smooth": Param((inputs,), f32, input_dim=0, shared=True),
    }


SIZES = st.fixed_dictionaries(
    {
        "size": st.integers(1, 4),
        "units": st.lists(st.integers(1, 5), min_size=1, max_size=3),
        "groups": st.integers(1, 4),
        "group": st.sampled_from([1, 4]),
        "pack": st.sampled_from([1, 2]),
        "kind": st.sampled_from(["column", "row", "replicated"]),
    }
)


@given(SIZES)
def test_the_ranks_parts_make_up_the_whole(sizes: dict[str, Any]) -> None:
    """Every element of every member's tensor is on the ranks that should have it, in a place of its own."""
    size, kind, group, pack = sizes["size"], sizes["kind"], sizes["group"], sizes["pack"]
    outputs = tuple(n * size * pack for n in sizes["units"])
    inputs = sizes["groups"] * size * group
    members = [declarations(output, inputs, group, pack) for output in outputs]
    declared = {name: [member[name] for member in members] for name in members[0]}
    for rank in range(size):
        layer = context(outputs, inputs, kind, rank, size)
        layouts = layouts_of(declared, layer)
        for name, layout in layouts.items():
            assert layout == layout_of(name, declared[name], layer)
            parts = [list(member.shape) or [1] for member in layout.members]
            for part, member in zip(parts, layout.members, strict=True):
                if member.output_dim is not None and kind == "column":
                    part[member.output_dim] //= size
                if member.input_dim is not None and kind == "row":
                    part[member.input_dim] //= size
            if layout.param.shared:
                assert (layout.axis, layout.shape) == (None, (len(parts), *parts[0]))
                continue
            axis = 0 if layout.param.output_dim is None else layout.param.output_dim
            assert layout.axis == axis
            assert [layout.member(i).stop - layout.member(i).start for i in range(len(parts))] == [
                p[axis] for p in parts
            ]
            assert [layout.member(i).start for i in range(1, len(parts))] == [
                layout.member(i).stop for i in range(len(parts) - 1)
            ]
            assert layout.shape[axis] == sum(part[axis] for part in parts)
            assert math.prod(layout.shape) == sum(math.prod(part) for part in parts)
            assert layout.input_parts == (size if kind == "row" else 1)


def test_key_value_heads_that_ranks_share() -> None:
    """An engine may hold one head on several ranks: local sizes are then more than the full size over the ranks."""
    shards = (Shard("q", 64, 16), Shard("k", 16, 8))
    layer = LinearContext(
        name="qkv",
        shards=shards,
        input_size=32,
        params_dtype=torch.float32,
        partition=Partition("column", 3, 4),
    )
    weights = [Param((s.output_size, 32), torch.int8, output_dim=0, input_dim=1) for s in shards]
    layout = layout_of("weight", weights, layer)
    assert (layout.shape, layout.offsets) == ((24, 32), (0, 16, 24))


def refused(declared: dict[str, list[Param]], layer: LinearContext) -> str:
    """The message of an impossible cut."""
    with pytest.raises(LimitError) as raised:
        layouts_of(declared, layer)
    return str(raised.value)


def test_a_cut_through_a_group_names_the_sizes_and_what_works() -> None:
    """3 groups of 32: cutting the weight over 4 ranks works, but not the scales."""
    scale = Param((8, 3), torch.float32, output_dim=0, input_dim=1, input_step=32)
    message = refused({"weight_scale": [scale]}, context((8,), 96, "row", 0, 4))
    assert message.split("\n") == [
        "layer: weight_scale cannot be cut over 4 tensor-parallel ranks",
        "  where: m0",
        "  found: 96 input features",
        "  expected: equal parts that are multiples of 32: one index of weight_scale stands for so many features",
        "  what to do: use tensor_parallel_size 3 (1 would fit as well)",
    ]


def test_a_cut_through_a_packed_value_names_the_sizes_and_what_works() -> None:
    weight = Param((6, 8), torch.uint8, output_dim=0, input_dim=1, output_step=2)
    message = refused({"weight": [weight]}, context((12,), 8, "column", 0, 4))
    assert "found: 3 of 12 output features of m0 on this rank" in message
    assert "multiples of 2" in message
    assert "use tensor_parallel_size 3" in message


def test_a_size_that_works_for_one_parameter_and_not_for_another_is_not_suggested() -> None:
    """The weight alone could be cut over 4 ranks instead of 5, its 3 groups only over 3."""
    declared = {
        "weight": [Param((8, 96), torch.int8, output_dim=0, input_dim=1)],
        "weight_scale": [Param((8, 3), torch.float32, output_dim=0, input_dim=1, input_step=32)],
    }
    layer = context((8,), 96, "row", 0, 5)
    assert "use tensor_parallel_size 3" in refused(declared, layer)
    with pytest.raises(LimitError, match="use tensor_parallel_size 4"):
        layout_of("weight", declared["weight"], layer)


@pytest.mark.parametrize(("inputs", "entries", "ranks", "works"), [(80, 4, 2, 1), (80, 3, 3, 1), (144, 6, 4, 3)])
def test_a_last_group_that_is_shorter(inputs: int, entries: int, ranks: int, works: int) -> None:
    """So many entries could be cut evenly, but not where the groups begin: 80 is 24 + 24 + 24 + 8."""
    step = 32 if entries == 3 else 24
    scale = Param((8, entries), torch.float32, output_dim=0, input_dim=1, input_step=step)
    message = refused({"weight_scale": [scale]}, context((8,), inputs, "row", 0, ranks))
    assert f"use tensor_parallel_size {works}" in message


@pytest.mark.parametrize(("kind", "size"), [("column", 2), ("row", 2), ("replicated", 1)])
def test_a_layer_that_no_size_helps(kind: str, size: int) -> None:
    weight = Param((3, 8), torch.uint8, output_dim=0, input_dim=1, output_step=2)
    assert "no tensor_parallel_size cuts this layer" in refused({"weight": [weight]}, context((7,), 8, kind, 0, size))


@given(SIZES, st.integers(2, 9), st.integers(1, 24), st.integers(1, 24))
def test_a_suggested_size_works(sizes: dict[str, Any], ranks: int, output: int, groups: int) -> None:
    """Whatever the sizes: the suggestion is possible, and nothing between it and what was asked for is."""
    group, pack, kind = sizes["group"], sizes["pack"], sizes["kind"]
    output, inputs = output * pack, groups * group
    declared = {n: [p] for n, p in declarations(output, inputs, group, pack).items()}

    def possible(size: int) -> bool:
        if kind == "column" and output % size:
            return False  # the engine itself would refuse
        try:
            layouts_of(declared, context((output,), inputs, kind, 0, size))
        except LimitError:
            return False
        return True

    try:
        layouts_of(declared, context((output,), inputs, kind, 0, ranks))
    except LimitError as error:
        (suggested,) = map(int, re.findall("use tensor_parallel_size ([0-9]+)", str(error)))
        assert possible(suggested)
        assert not any(possible(size) for size in range(suggested + 1, ranks))


def test_members_of_one_kind_differ_in_output_features_only() -> None:
    a = Param((8, 16), torch.int8, output_dim=0, input_dim=1)
    assert same_kind([a, Param((24, 16), torch.int8, output_dim=0, input_dim=1)])
    assert same_kind([a])
    assert not same_kind([a, Param((8, 32), torch.int8, output_dim=0, input_dim=1)])
    assert not same_kind([a, Param((8, 16), torch.uint8, output_dim=0, input_dim=1)])
    assert not same_kind([a, Param((8, 16), torch.int8, output_dim=1, input_dim=0)])
    assert not same_kind([Param((1,), torch.float32), Param((2,), torch.float32)])


def test_int64_scales_are_the_bits_of_float32() -> None:
    scales = torch.tensor([1e-3, 0.5, 3e4, -2.0])
    signed = scales.view(torch.int32).to(torch.int64)
    assert torch.equal(params.float_values(signed), scales)
    assert torch.equal(params.float_values(signed & 0xFFFFFFFF), scales)
    assert torch.equal(params.float_values(signed & 0xFFFFFFFF | 1 << 46), scales)
    half = scales.to(torch.bfloat16)
    assert torch.equal(params.float_values(half), half.to(torch.float32))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (params.positive, [1e-30, 1.0], [0.0, -1.0, NAN, INF]),
        (params.integral_int8, [-128.0, 0.0, 127.0], [-129.0, 128.0, 0.5, NAN, INF]),
        (params.zero, [0.0, -0.0], [1.0, -1e-30, NAN]),
        (params.finite, [0.0, -3e38], [NAN, INF, -INF]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_of_values(check: params.ValueCheck, good: list[float], bad: list[float], dtype: torch.dtype) -> None:
    assert check(torch.tensor([good], dtype=dtype)) is None
    assert check(torch.empty(0, dtype=dtype)) is None
    for value in bad:
        complaint = check(torch.tensor([*good, value], dtype=dtype))
        assert complaint is not None
        assert complaint.startswith(f"1 of {len(good) + 1} values are not ")
        assert "for example" in complaint


def test_a_check_of_encoded_scales_looks_at_their_values() -> None:
    encoded = torch.tensor([0.5, -0.5, 2.0]).view(torch.int32).to(torch.int64)
    assert params.positive(encoded) == "1 of 3 values are not finite and positive, for example -0.5"
    assert params.positive(encoded[::2]) is None


def test_a_parameter_is_replaced_without_gradient() -> None:
    layer = nn.Module()
    for value in (torch.zeros(2, 3), torch.ones(4, dtype=torch.int8)):
        replace_parameter(layer, "weight", value)
        assert torch.equal(layer.get_parameter("weight"), value)
        assert not layer.get_parameter("weight").requires_grad
        assert tensor_of(layer, "weight") is layer.get_parameter("weight")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def block_scale(output: int, inputs: int, rows: int = 128, columns: int = 128) -> Param:
    """The scales of blocks, the last of which may be partial in both directions."""
    shape = (-(-output // rows), -(-inputs // columns))
    return Param(shape, torch.float32, 0, 1, output_step=rows, input_step=columns, per_row=True)


@pytest.mark.parametrize("kind", ["replicated", "row"])
def test_members_start_a_block_each(kind: str) -> None:
    """Whatever lies before them: 64, 192 and 300 rows have one, two and three blocks of 128."""
    outputs = (64, 192, 300)
    layout = layout_of("weight_scale", [block_scale(o, 512) for o in outputs], context(outputs, 512, kind, 0, 2))
    assert (layout.shape, layout.offsets) == ((6, 2 if kind == "row" else 4), (0, 1, 3, 6))


def test_blocks_are_cut_between_two_of_them() -> None:
    outputs = (512, 256)
    layout = layout_of("weight_scale", [block_scale(o, 300) for o in outputs], context(outputs, 300, "column", 1, 2))
    assert (layout.shape, layout.offsets) == ((3, 3), (0, 2, 3))
    stored = torch.arange(12.0).view(4, 3)
    assert torch.equal(layout.cut(stored, 0, 1, 0), stored[2:])


def test_a_cut_through_a_block_names_what_would_fit() -> None:
    """Of rows, even if all of a rank's lie in one block; of columns, partial last blocks cannot be cut at all."""
    message = refused({"weight_scale": [block_scale(512, 512)]}, context((512,), 512, "column", 0, 8))
    assert "found: 64 of 512 output features of m0 on this rank" in message
    assert "equal parts that are multiples of 128" in message
    assert "use tensor_parallel_size 4 (2, 1 would fit as well)" in message
    message = refused({"weight_scale": [block_scale(300, 512)]}, context((300,), 512, "column", 0, 2))
    assert "use tensor_parallel_size 1" in message
    message = refused({"weight_scale": [block_scale(300, 320)]}, context((300,), 320, "row", 0, 2))
    assert "found: 320 input features" in message
    assert "use tensor_parallel_size 1" in message


def test_a_packed_value_is_never_partial() -> None:
    """No index holds the seventh row of seven."""
    weight = Param((3, 8), torch.uint8, output_dim=0, input_dim=1, output_step=2)
    assert "no tensor_parallel_size cuts this layer" in refused({"weight": [weight]}, context((7,), 8))
