"""Quantised caches, by what the description says and by the tensors beside the projections of keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import CheckpointFolder, LayerQuery, LayerResolutionError, QuantError
from quant_modelslim import ModelSlimFormat

ATTENTION, OTHER = "model.layers.0.self_attn", "model.layers.1.self_attn"
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weights.safetensors"
NAMES = [f"{part}_proj.kv_cache_{kind}" for part in "kv" for kind in ("scale", "offset")]
CANONICAL = dict(zip(NAMES, ("k_scale", "k_offset", "v_scale", "v_offset"), strict=True))


def put(small: Any, attention: str = ATTENTION, names: list[str] = NAMES, quant_type: str = "C8") -> Any:
    """Tensors of a cache, described as such."""
    for name in names:
        small.tensors[f"{attention}.{name}"] = torch.ones(16)
        small.description[f"{attention}.{name}"] = quant_type
    return small


def load(small: Any, folder: Path) -> ModelSlimFormat:
    return ModelSlimFormat.load(CheckpointFolder(small.write(folder)))


def test_no_cache(tmp_path: Path, small: Any) -> None:
    assert load(small, tmp_path).caches == {}


def test_a_cache_belongs_to_the_attention_module(tmp_path: Path, small: Any) -> None:
    """By canonical names; the projections below are what they are without it."""
    plain = load(small, tmp_path / "plain")
    read = load(put(small), tmp_path / "quantised")
    assert list(read.caches) == [ATTENTION]
    quant = read.caches[ATTENTION]
    (form,) = quant.stored
    assert (quant.quant_type, quant.modules) == ("C8", (ATTENTION,))
    assert {tensor.name: name for name, tensor in form.tensors.items()} == {
        f"{ATTENTION}.{name}": canonical for name, canonical in CANONICAL.items()
    }
    assert form.weight is not None
    assert (form.weight.strategy, form.weight.symmetric) == ("channel", False)
    assert str(quant.evidence[0]) == f"{DESCRIPTION}: {ATTENTION}.k_proj.kv_cache_scale = C8"
    for part in ("q_proj", "k_proj", "v_proj"):
        query = LayerQuery(f"{ATTENTION}.{part}")
        assert read.layer_quant(query).quant_type == plain.layer_quant(query).quant_type == "W8A8_DYNAMIC"
        assert read.create_scheme_for_layer(query) is not None
    for name in NAMES:
        assert read.canonical_name(f"{ATTENTION}.{name}") is None
    assert read.canonical_name(f"{ATTENTION}.k_proj.weight") == f"{ATTENTION}.k_proj.weight"


def test_without_offsets(tmp_path: Path, small: Any) -> None:
    read = load(put(small, names=[name for name in NAMES if name.endswith("scale")]), tmp_path)
    (form,) = read.caches[ATTENTION].stored
    assert form.tensors.keys() == {"k_scale", "v_scale"}
    assert form.weight is not None
    assert form.weight.symmetric


def test_some_layers_alone(tmp_path: Path, small: Any) -> None:
    """Layers without scales stay float, quantised projections or not."""
    small.description["kv_cache_type"] = "C8"
    assert list(load(put(small, OTHER), tmp_path).caches) == [OTHER]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("kv_cache_type", "k_proj.kv_cache_scale"),
        ("kv_quant_type", "k_proj.kv_cache_scale"),
        ("fa_quant_type", "fa_k.scale"),
    ],
)
def test_a_claim_without_scales(key: str, expected: str, tmp_path: Path, small: Any) -> None:
    small.description[key] = "C8"
    with pytest.raises(LayerResolutionError) as raised:
        load(small, tmp_path)
    message = str(raised.value)
    for said in (DESCRIPTION, f"found: {key}: 'C8'\n", f".{expected}\n", "what to do: "):
        assert said in message


@pytest.mark.parametrize("lacking", [*[[name] for name in NAMES], NAMES[:2], NAMES[2:]], ids=str)
def test_tensors_that_neither_files_nor_description_have(lacking: list[str], tmp_path: Path, small: Any) -> None:
    """Half of a cache: what is there and what is not, as the checkpoint calls it."""
    there = [name for name in NAMES if name not in lacking]
    with pytest.raises(LayerResolutionError) as raised:
        load(put(small, names=there), tmp_path)
    found, expected = (
        next(line for line in str(raised.value).splitlines() if f"  {part}: " in line) for part in ("found", "expected")
    )
    for name in NAMES:
        assert (f"{ATTENTION}.{name}" in found) == (name in there)
        assert (f"{ATTENTION}.{name}" in expected) == (name in lacking)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_the_files_lack(name: str, tmp_path: Path, small: Any) -> None:
    del put(small).tensors[f"{ATTENTION}.{name}"]
    with pytest.raises(QuantError, match=f"{ATTENTION}.{name} is described as C8, but no file holds it"):
        load(small, tmp_path)


def test_tensors_of_no_type(tmp_path: Path, small: Any) -> None:
    put(small)
    for name in NAMES:
        del small.description[f"{ATTENTION}.{name}"]
    with pytest.raises(LayerResolutionError, match=f"does not say of which type the cache of {ATTENTION} is") as raised:
        load(small, tmp_path)
    assert f"found: {ATTENTION}.k_proj.kv_cache_scale in {WEIGHTS}\n" in str(raised.value)


def test_tensors_of_several_types(tmp_path: Path, small: Any) -> None:
    put(small, names=NAMES[:2])
    put(small, names=NAMES[2:], quant_type="KV_FP8")
    with pytest.raises(LayerResolutionError, match=f"gives the cache of {ATTENTION} several types") as raised:
        load(small, tmp_path)
    for said in ("k_proj.kv_cache_scale is C8", "v_proj.kv_cache_scale is KV_FP8"):
        assert f"{ATTENTION}.{said}" in str(raised.value)


def test_a_type_that_nobody_registered(tmp_path: Path, small: Any) -> None:
    with pytest.raises(QuantError, match="'C9'") as raised:
        load(put(small, quant_type="C9"), tmp_path)
    assert f"{ATTENTION}.k_proj.kv_cache_scale" in str(raised.value)


# --- latent attention -------------------------------------------------------------------------------------------------

COMPUTED = [f"fa_{part}.{kind}" for part in "qkv" for kind in ("scale", "offset")]


def latent(small: Any, names: list[str] = COMPUTED, said: str = "FAQuant") -> Any:
    put(small, names=names, quant_type="FAQuant")
    small.description[f"{ATTENTION}.quant_type"] = said
    return small


def test_a_type_that_the_attention_module_has(tmp_path: Path, small: Any) -> None:
    quant = load(latent(small), tmp_path).caches[ATTENTION]
    assert quant.quant_type in ("FAQuant", "FAKQuant")
    assert str(quant.evidence[0]) == f"{DESCRIPTION}: {ATTENTION}.quant_type = FAQuant"
    (form,) = quant.stored
    assert form.tensors.keys() == {f"{part}_{kind}" for part in "qkv" for kind in ("scale", "offset")}
    assert form.weight is not None
    assert form.weight.strategy == "tensor"


@pytest.mark.parametrize("lacking", ["fa_k.scale", "fa_v.scale", "fa_k.offset"])
def test_half_of_a_latent_cache(lacking: str, tmp_path: Path, small: Any) -> None:
    with pytest.raises(LayerResolutionError, match=f"expected: also {ATTENTION}.{lacking}"):
        load(latent(small, [name for name in COMPUTED if name != lacking]), tmp_path)


def test_a_layer_that_claims_a_type_alone(tmp_path: Path, small: Any) -> None:
    """Beside another that has its scales."""
    latent(small).description[f"{OTHER}.quant_type"] = "FAQuant"
    with pytest.raises(LayerResolutionError, match=f"found: {OTHER}.quant_type: 'FAQuant'") as raised:
        load(small, tmp_path)
    assert f"{OTHER}.fa_k.scale" in str(raised.value)
