"""What the format states of a module: packing, groups, stages and transforms, by writer and headers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core import (
    AscendLinearScheme,
    CheckpointFolder,
    LayerQuery,
    LinearSizes,
    LoadError,
    Packing,
    Param,
    QuantError,
    StoredForm,
    StoredTensor,
    create_scheme,
    get_scheme_class,
    register_scheme,
)
from quant_core.formats import respelled
from quant_core.queries import LayerQuant
from quant_core.schemes import registry
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_modelslim import ModelSlimFormat
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


class OwnWeight(AscendW8A8DynamicLinearMethod):
    """Built on a type of ours, with a packed weight and second-stage scales that it declares itself."""

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        shape = (output_size // 2, input_size)
        return {"weight": Param(shape, torch.int8, output_dim=0, input_dim=1, output_step=2)}

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        names = {"weight_scale": (output_size, 1), "weight_scale_second": (output_size, 4)}
        return {name: Param(shape, torch.float32, output_dim=0) for name, shape in names.items()}


class PlainTensors(AscendLinearScheme):
    """In vllm-ascend's style, for sizes that real layers have."""

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        if input_size % 64:
            raise ValueError("input size must be a multiple of 64")
        return {"weight": torch.empty(output_size, input_size // 8, dtype=torch.int32)}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        return {"weight_scale": torch.empty(output_size, 1, dtype=torch.float32)}

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two types of somebody else, for one test."""
    get_scheme_class("W8A8", "linear")  # everything is loaded
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_scheme("OWN_WEIGHT", "linear")(OwnWeight)
    register_scheme("PLAIN_TENSORS", "linear")(PlainTensors)


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize("known", [None, 64])
def test_types_that_declare_their_parameters_themselves(known: int | None, tmp_path: Path) -> None:
    """They go by the writers' names, and their hooks tell how large a module is."""
    files = {
        "OWN_WEIGHT": {
            "weight": int8(4, 64),
            "weight_scale": torch.ones(8, 1),
            "weight_scale_second": torch.ones(8, 4),
        },
        "PLAIN_TENSORS": {"weight": torch.zeros(8, 8, dtype=torch.int32), "weight_scale": torch.ones(8, 1)},
    }
    tensors = {f"{kind}.{name}": tensor for kind, stored in files.items() for name, tensor in stored.items()}
    save_file(tensors, tmp_path / "quant_model_weights.safetensors")
    description = {name: name.partition(".")[0] for name in tensors}
    (tmp_path / "quant_model_description.json").write_text(json.dumps(description))
    read = ModelSlimFormat.load(CheckpointFolder(tmp_path))
    for kind, stored in files.items():
        sizes = None if known is None else LinearSizes(known, (8,))
        scheme = read.create_scheme_for_layer(LayerQuery(kind, sizes=sizes))
        assert scheme is not None
        assert (scheme.context.input_size, scheme.context.output_size) == (64, 8)
        assert sorted(scheme.context.form.tensors) == sorted(stored)
    tensors["PLAIN_TENSORS.weight_scale"] = torch.ones(9, 1)
    save_file(tensors, tmp_path / "quant_model_weights.safetensors")
    (finding,) = ModelSlimFormat.findings(CheckpointFolder(tmp_path))
    assert finding.tensor == "PLAIN_TENSORS.weight_scale"


def test_what_is_found_out_once_holds_for_modules_that_are_alike(tmp_path: Path) -> None:
    """Of other shapes, other groups are stated."""
    tensors = {
        **{f"a.{name}": t for name, t in {"weight": int8(8, 64), "weight_scale": torch.ones(8, 4)}.items()},
        **{f"b.{name}": t for name, t in {"weight": int8(8, 64), "weight_scale": torch.ones(8, 2)}.items()},
        **{f"c.{name}": t for name, t in {"weight": int8(8, 64), "weight_scale": torch.ones(8, 4)}.items()},
    }
    save_file(tensors, tmp_path / "quant_model_weights.safetensors")
    (tmp_path / "quant_model_description.json").write_text(json.dumps(dict.fromkeys(tensors, "W8A16")))
    read = ModelSlimFormat.load(CheckpointFolder(tmp_path))
    stored = [read.layer_quant(LayerQuery(name)).stored[0] for name in "abc"]
    assert [form.weight.group_size for form in stored if form.weight] == [16, 32, 16]
    assert [form.module for form in stored] == ["a", "b", "c"]


@pytest.mark.parametrize("absent", ["weight_scale", "weight_offset", "weight_scale_second"])
def test_a_stage_that_is_missing_is_named_as_the_writer_calls_it(absent: str) -> None:
    tensors = {
        "weight": int8(8, 64),
        "weight_scale": torch.ones(8, 1),
        "weight_offset": torch.zeros(8, 1),
        "weight_scale_second": torch.ones(8, 4),
        "weight_offset_second": torch.zeros(8, 4, dtype=torch.int64),
    }
    raw = module(**{name: tensor for name, tensor in tensors.items() if name != absent})
    form = respelled(raw, canonical_suffixes(raw, Description("d.json", {"m.weight": "W4A8_DYNAMIC"})))
    quant = LayerQuant("W4A8_DYNAMIC", ("m",), (stated(form, "W4A8_DYNAMIC", PACKS, query()),))
    if absent == "weight_offset":  # which a symmetric type need not store
        assert create_scheme(query(), quant) is not None
        return
    with pytest.raises(LoadError, match=rf"m\.{absent} is absent"):
        create_scheme(query(), quant)


@pytest.mark.parametrize("columns", [0, 1])
def test_empty_and_scalar_tensors_are_errors_of_ours(columns: int) -> None:
    for form in (
        module(weight=int8(16, columns), weight_scale=torch.ones(16, 4)),
        module(weight=torch.tensor(1, dtype=torch.int8), weight_scale=torch.ones(16, 1)),
    ):
        for quant_type in ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16", "W8A16"):
            with pytest.raises(QuantError):
                create_scheme(query(), LayerQuant(quant_type, ("m",), (stated(form, quant_type, PACKS, query()),)))
