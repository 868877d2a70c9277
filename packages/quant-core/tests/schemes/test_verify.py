"""Comparing declarations with files and with values."""

from dataclasses import replace

import pytest
import torch

from quant_core import AscendLinearScheme, LinearContext, LoadError, Param, Shard, StoredForm, StoredTensor, params
from quant_core.schemes.verify import check_values, linear_params, stored_problems, verify_stored

Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]

I8, F32, BF16 = torch.int8, torch.float32, torch.bfloat16


class Plain(AscendLinearScheme):
    """Stores a weight and its scale."""

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"weight": Param((output_size, input_size), I8, output_dim=0, input_dim=1)}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"weight_scale": Param((output_size, 1), F32, output_dim=0, check=params.positive)}

    def apply(self, layer: object, x: torch.Tensor, bias: object = None, tp_rank: int = 0) -> torch.Tensor:
        raise NotImplementedError


def form(module: str, tensors: Forms, file: str = "w.safetensors") -> StoredForm:
    """What a header says."""
    return StoredForm(
        module, {s: StoredTensor(f"{module}.{s}", shape, dtype, file) for s, (shape, dtype) in tensors.items()}
    )


def good(output: int) -> Forms:
    """What Plain declares."""
    return {"weight": ((output, 16), I8), "weight_scale": ((output, 1), F32)}


def scheme_of(
    *stored: StoredForm, sizes: tuple[int, ...] = (8, 4), scheme: type[AscendLinearScheme] = Plain
) -> AscendLinearScheme:
    """A scheme for members a.0, a.1, ... of these sizes."""
    shards = tuple(Shard(f"a.{i}", size, size) for i, size in enumerate(sizes))
    return scheme.create(LinearContext(name="fused", shards=shards, input_size=16, params_dtype=F32, stored=stored))


def complaint(scheme: AscendLinearScheme) -> str:
    """Why the files do not fit."""
    with pytest.raises(LoadError) as raised:
        verify_stored(scheme)
    return str(raised.value)


def test_files_that_hold_what_is_declared() -> None:
    verify_stored(scheme_of(form("a.0", good(8)), form("a.1", {**good(4), "bias": ((4,), BF16)})))


def test_without_files_there_is_nothing_to_compare() -> None:
    verify_stored(scheme_of())
    verify_stored(scheme_of(StoredForm("a.0"), StoredForm("a.1")))


def test_every_difference_is_listed_with_tensor_and_file() -> None:
    one = form("a.0", {"weight": ((8, 15), I8), "weight_scale": ((8, 1), BF16)}, "one.safetensors")
    two = form("a.1", {"weight": ((4, 16), I8), "anti_outlier": ((3,), F32)}, "two.safetensors")
    message = complaint(scheme_of(one, two))
    assert message.startswith(
        "fused: the files do not hold what the scheme Plain loads\n  where: one.safetensors, two."
    )
    for part in (
        "a.0.weight in one.safetensors is int8 [8, 15], expected int8 [8, 16]",
        "a.0.weight_scale in one.safetensors is bfloat16 [8, 1], expected float32 [8, 1]",
        "a.1.weight_scale is absent, expected float32 [4, 1]",
        "a.1.anti_outlier in two.safetensors is not used by this type",
    ):
        assert part in message


def test_a_member_without_any_tensor() -> None:
    message = complaint(scheme_of(form("a.0", good(8)), StoredForm("a.1")))
    assert "a.1.weight is absent, expected int8 [4, 16]" in message
    assert "a.0" not in message


def test_a_module_that_is_fused_on_disk_holds_the_rows_of_all_members() -> None:
    stored = form("a.0", good(12))
    scheme = scheme_of(stored, stored)
    whole = replace(scheme.context, shards=(Shard("a.0", 8, 8), Shard("a.0", 4, 4)))
    verify_stored(Plain.create(whole))
    assert "expected int8 [12, 16]" in complaint(Plain.create(replace(whole, stored=(form("a.0", good(8)),) * 2)))


def test_a_module_that_is_loaded_into_several_members_has_the_rows_of_each() -> None:
    """A model that uses k as v."""
    shards = (Shard("a.0", 8, 8), Shard("a.1", 4, 4), Shard("a.1", 4, 4))
    stored = tuple(form(f"a.{i}", good(rows)) for i, rows in ((0, 8), (1, 4), (1, 4)))
    verify_stored(
        Plain.create(LinearContext(name="fused", shards=shards, input_size=16, params_dtype=F32, stored=stored))
    )
    short = (stored[0], form("a.1", good(3)), form("a.1", good(3)))
    message = complaint(
        Plain.create(LinearContext(name="fused", shards=shards, input_size=16, params_dtype=F32, stored=short))
    )
    assert "a.1.weight in w.safetensors is int8 [3, 16]" in message


@pytest.mark.parametrize("bias", [((8,), F32), ((8,), BF16), ((8,), torch.float16)])
def test_a_bias_beside_the_weight(bias: tuple[tuple[int, ...], torch.dtype]) -> None:
    verify_stored(scheme_of(form("a.0", {**good(8), "bias": bias}), sizes=(8,)))


@pytest.mark.parametrize("bias", [((4,), F32), ((8, 1), F32), ((8,), torch.int32), ((8,), torch.float8_e4m3fn)])
def test_a_bias_that_cannot_be_one(bias: tuple[tuple[int, ...], torch.dtype]) -> None:
    message = complaint(scheme_of(form("a.0", {**good(8), "bias": bias}), sizes=(8,)))
    assert "a.0.bias in w.safetensors is " in message
    assert "expected [8] of a float dtype" in message


def test_problems_of_one_module() -> None:
    declared = scheme_of().params(16, 8)
    assert list(stored_problems(form("m", good(8)), declared)) == []
    assert len(list(stored_problems(StoredForm("m"), declared))) == 2


def test_declarations_of_all_members() -> None:
    declared = linear_params(scheme_of())
    assert {name: [p.shape for p in members] for name, members in declared.items()} == {
        "weight": [(8, 16), (4, 16)],
        "weight_scale": [(8, 1), (4, 1)],
    }


class Uneven(Plain):
    """Scales wide members in groups, and gives only them an offset."""

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        wide = output_size > 4
        return {"weight_scale": Param((output_size, 2 if wide else 1), F32, output_dim=0)}


class Partial(Plain):
    """Gives only wide members an offset."""

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"weight_offset": Param((output_size, 1), F32, output_dim=0)} if output_size > 4 else {}


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)])
@pytest.mark.parametrize(
    ("scheme", "name", "forms"),
    [
        (Uneven, "weight_scale", {8: "float32 [8, 2]", 4: "float32 [4, 1]"}),
        (Partial, "weight_offset", {8: "float32 [8, 1]", 4: "nothing"}),
    ],
)
def test_members_that_store_different_things(
    sizes: tuple[int, int], scheme: type[AscendLinearScheme], name: str, forms: dict[int, str]
) -> None:
    with pytest.raises(LoadError) as raised:
        linear_params(scheme_of(sizes=sizes, scheme=scheme))
    assert f"fused: the members of this fused layer store {name} in different forms" in str(raised.value)
    assert f"found: a.0: {forms[sizes[0]]}; a.1: {forms[sizes[1]]}" in str(raised.value)


def test_values_are_judged_by_the_declaration() -> None:
    names = ["a.0.weight_scale", "a.1.weight_scale"]
    scale = Param((3,), F32, check=params.positive)
    check_values("fused", names, scale, torch.ones(3))
    check_values("fused", names, Param((3,), F32), torch.full((3,), float("nan")))  # nothing to judge by
    with pytest.raises(LoadError) as raised:
        check_values("fused", names, scale, torch.tensor([1.0, 0.0, -1.0]))
    message = str(raised.value)
    assert "fused: weight_scale cannot be used" in message
    assert "where: a.0.weight_scale, a.1.weight_scale" in message
    assert "2 of 3 values are not finite and positive, for example 0.0" in message
