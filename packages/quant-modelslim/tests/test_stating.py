"""What the format states of a module: packing, groups, stages and transforms, by writer and headers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core import LayerQuery, LinearSizes, LoadError, Packing, StoredForm, StoredTensor, create_scheme
from quant_core.formats import respelled
from quant_core.queries import LayerQuant
from quant_modelslim.description import Description, GlobalKeys
from quant_modelslim.stating import canonical_suffixes, stated

PACKS = Description("d.json", {}, keys=GlobalKeys(version="1.0.0"))
OLDER = Description("d.json", {})


def module(**tensors: Tensor) -> StoredForm:
    """What the headers of these tensors say."""
    named = {s: StoredTensor(f"m.{s}", tuple(t.shape), t.dtype, "w.safetensors") for s, t in tensors.items()}
    return StoredForm("m", named)


def int8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def query(inputs: int | None = None) -> LayerQuery:
    return LayerQuery("m", sizes=LinearSizes(inputs))


@pytest.mark.parametrize(
    ("rows", "columns", "groups", "description", "inputs", "packing", "sizes"),
    [
        (8, 32, 1, PACKS, None, Packing(1), (64, 8)),
        (8, 64, 1, OLDER, None, None, (64, 8)),  # [8, 64] as well, and another weight: the writer tells
        (8, 64, 1, PACKS, 64, None, (64, 8)),
        (8, 32, 1, OLDER, 64, Packing(1), (64, 8)),
        (4, 64, 4, PACKS, None, Packing(0), (64, 8)),
        (8, 64, 4, PACKS, None, None, (64, 8)),
        (4, 64, 1, PACKS, None, Packing(0), (64, 8)),
    ],
)
def test_how_w4a16_is_packed(
    rows: int, columns: int, groups: int, description: Description, inputs: int | None, packing: Any, sizes: Any
) -> None:
    form = module(weight=int8(rows, columns), weight_scale=torch.zeros(8, groups))
    found = stated(form, "W4A16", description, query(inputs))
    assert found.weight is not None
    assert (found.weight.num_bits, found.weight.packing, found.sizes()) == (4, packing, sizes)
    assert found.weight.group_size == (64 // groups if groups > 1 else None)
    assert found.input is None


@pytest.mark.parametrize(("rows", "packing"), [(4, Packing(0)), (8, None)])
def test_two_stages_have_canonical_names(rows: int, packing: Any) -> None:
    raw = module(
        weight=int8(rows, 64),
        weight_scale=torch.ones(8, 1),
        weight_offset=torch.zeros(8, 1),
        weight_scale_second=torch.ones(8, 4),
        weight_offset_second=torch.zeros(8, 4, dtype=torch.int64),
    )
    form = respelled(raw, canonical_suffixes(raw, Description("d.json", {"m.weight": "W4A8_DYNAMIC"})))
    found = stated(form, "W4A8_DYNAMIC", PACKS, query())
    assert found.weight is not None
    assert (found.weight.outer, found.weight.strategy, found.weight.group_size) == ("channel", "group", 16)
    assert found.weight.packing == packing
    assert found.input is not None
    assert (found.input.num_bits, found.input.dynamic, found.input.strategy) == (8, True, "token")
    assert isinstance(create_scheme(query(), LayerQuant("W4A8_DYNAMIC", ("m",), (found,))).context.input_size, int)


def test_a_type_that_declares_its_parameters_itself_goes_by_the_writers_names() -> None:
    """As schemes ported from vllm-ascend do."""
    raw = module(weight=int8(4, 64), weight_scale=torch.ones(8, 1), weight_scale_second=torch.ones(8, 4))
    assert canonical_suffixes(raw, Description("d.json", {"m.weight": "W4A8_DYNAMIC"}))["weight_scale"]
    assert set(canonical_suffixes(module(weight=int8(8, 64)), PACKS)) == set()


@pytest.mark.parametrize("quant_type", ["W8A8_SVD_DYNAMIC", "W4A4_MXFP4_SVD"])
def test_an_svd_type_needs_its_factors(quant_type: str) -> None:
    """Without them it would be another type."""
    weights = {
        "W8A8_SVD_DYNAMIC": {"weight": int8(8, 64), "weight_scale": torch.ones(8, 1)},
        "W4A4_MXFP4_SVD": {
            "weight": torch.zeros(8, 32, dtype=torch.uint8),
            "weight_scale": torch.zeros(8, 2, dtype=torch.uint8),
        },
    }
    form = stated(module(**weights[quant_type]), quant_type, PACKS, query())
    assert form.transforms == ("low_rank",)
    with pytest.raises(LoadError, match=r"m.svd_lowrank_l1 is absent") as raised:
        create_scheme(query(), LayerQuant(quant_type, ("m",), (form,)))
    assert "m.svd_lowrank_l2 is absent" in str(raised.value)


def test_rotations_are_stated() -> None:
    form = module(weight=int8(8, 64), weight_scale=torch.ones(8, 1), heads_rotation=torch.eye(4))
    assert stated(form, "W8A8_DYNAMIC", PACKS, query()).transforms == ("heads_rotation",)


@pytest.mark.parametrize(("inputs", "size"), [(1024, 512), (768, None)])
def test_planning_takes_the_usual_outer_groups_where_they_fit(inputs: int, size: int | None) -> None:
    found = stated(StoredForm("m"), "W4A4_MXFP4_DUALSCALE", PACKS, query(inputs))
    assert found.weight is not None
    assert found.weight.outer_group_size == size


def test_outer_groups_of_any_length() -> None:
    form = module(
        weight=torch.zeros(8, 64, dtype=torch.uint8),
        weight_scale=torch.zeros(8, 4, dtype=torch.uint8),
        weight_dual_scale=torch.ones(8, 2, 1),
    )
    found = stated(form, "W4A4_MXFP4_DUALSCALE", PACKS, query())
    assert found.weight is not None
    assert (found.weight.outer_group_size, found.sizes()) == (64, (128, 8))


def test_what_no_scheme_serves_is_left_as_it_is() -> None:
    form = module(weight=int8(8, 64))
    assert stated(form, "W3A3", PACKS, query()) == form
    assert replace(stated(form, "W8A8", PACKS, query()), weight=None, input=None) == form
