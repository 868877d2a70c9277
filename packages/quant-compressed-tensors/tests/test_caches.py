"""Quantised caches, by what the section says and by the tensors that every writer stores for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_folders import FP8_STATIC, HEADS, INT8_STATIC, SIZES, Content, asymmetric, content, group

from quant_compressed_tensors import CompressedTensorsFormat
from quant_core import CheckpointFolder, LayerResolutionError, QuantError, UnsupportedSchemeError

PLACE = "quantization_config.kv_cache_scheme"
ATTENTIONS = [f"model.layers.{layer}.self_attn" for layer in range(2)]

#: Where writers put the scales of keys and values.
PLACES = {
    "beside the projections": ("k_scale", "v_scale"),
    "below the projections": ("k_proj.k_scale", "v_proj.v_scale"),
    "as scales of outputs": ("k_proj.output_scale", "v_proj.output_scale"),
}


def with_cache(scheme: dict[str, Any], places: tuple[str, ...] = ("k_scale", "v_scale"), value: Any = None) -> Content:
    """A model whose layers have one tensor at each place."""
    found = content(kv_cache_scheme=scheme)
    for attention in ATTENTIONS:
        found.tensors |= {f"{attention}.{place}": torch.ones(1) if value is None else value for place in places}
    found.tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    return found


def load(found: Content, folder: Path) -> CompressedTensorsFormat:
    return CompressedTensorsFormat.load(CheckpointFolder(found.write(folder)))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("scheme", "quant_type"), [(INT8_STATIC, "C8"), (FP8_STATIC, "KV_FP8")])
def test_every_place_of_scales(
    scheme: dict[str, Any], quant_type: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    """Asked for the attention module; the linear layers are served without them."""
    read = load(with_cache(scheme, places), tmp_path)
    assert list(read.caches) == ATTENTIONS
    for attention, quant in read.caches.items():
        (form,) = quant.stored
        assert (quant.quant_type, quant.modules, quant.evidence[0].key) == (quant_type, (attention,), PLACE)
        assert {canonical: tensor.name for canonical, tensor in form.tensors.items()} == {
            "k_scale": f"{attention}.{places[0]}",
            "v_scale": f"{attention}.{places[1]}",
        }
        assert form.weight is not None
        assert (form.weight.type, form.weight.strategy, form.weight.symmetric) == (scheme["type"], "tensor", True)
        for place in places:
            assert read.canonical_name(f"{attention}.{place}") is None


@pytest.mark.parametrize("strategy", ["tensor", "attn_head", "channel"])
def test_what_shares_a_scale(strategy: str, tmp_path: Path) -> None:
    shape = {"tensor": (1,), "attn_head": (2, 1, 1), "channel": (HEADS,)}[strategy]
    read = load(with_cache({**INT8_STATIC, "strategy": strategy}, value=torch.ones(shape)), tmp_path)
    for quant in read.caches.values():
        assert quant.stored[0].weight is not None
        assert quant.stored[0].weight.strategy == {"attn_head": "head"}.get(strategy, strategy)


def test_zero_points(tmp_path: Path) -> None:
    """Whole numbers in the place of offsets: a value is (q - z) · s in both formats."""
    places = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")
    read = load(with_cache(asymmetric(INT8_STATIC), places), tmp_path)
    for quant in read.caches.values():
        assert quant.stored[0].tensors.keys() == {"k_scale", "v_scale", "k_offset", "v_offset"}
        assert quant.stored[0].weight is not None
        assert not quant.stored[0].weight.symmetric


@pytest.mark.parametrize("scheme", [{"num_bits": 8}, {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}])
def test_what_a_section_may_leave_out(scheme: dict[str, Any], tmp_path: Path) -> None:
    """The library's own defaults, which it spells otherwise than a file: integers, of the tensor."""
    read = load(with_cache(scheme), tmp_path)
    assert {quant.quant_type for quant in read.caches.values()} == {"KV_FP8" if scheme.get("type") == "float" else "C8"}
    kind = scheme.get("type", "int")
    assert {str(quant.evidence[0]) for quant in read.caches.values()} == {f"config.json: {PLACE} = {kind}8 per tensor"}


@pytest.mark.parametrize("scheme", [None, {}, "null"])
def test_no_cache(scheme: Any, tmp_path: Path) -> None:
    assert load(content(kv_cache_scheme=scheme), tmp_path).caches == {}


def test_a_cache_alone(tmp_path: Path) -> None:
    """Of a model that is float otherwise."""
    found = with_cache(FP8_STATIC)
    found.section["config_groups"] = {}
    for layer in range(2):
        for name in SIZES:
            found.put_float(f"model.layers.{layer}.{name}")
    assert list(load(found, tmp_path).caches) == ATTENTIONS


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({**INT8_STATIC, "num_bits": 4}, "int4"),
        ({**FP8_STATIC, "num_bits": 4}, "float4"),
        ({**INT8_STATIC, "dynamic": True}, "found at run time"),
        ({**FP8_STATIC, "strategy": "token", "dynamic": True}, "found at run time"),
        ({**INT8_STATIC, "strategy": "group", "group_size": 16}, "per group"),
    ],
)
def test_what_no_scheme_keeps(scheme: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSchemeError) as raised:
        load(with_cache(scheme), tmp_path)
    for text in (f"where: config.json: {PLACE}\n", "a key/value cache of", said, "what to do: "):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ([f"{ATTENTIONS[0]}.k_scale"], PLACES["beside the projections"]),
        ([f"{ATTENTIONS[1]}.v_scale"], PLACES["beside the projections"]),
        ([f"{ATTENTIONS[1]}.k_scale", f"{ATTENTIONS[1]}.v_scale"], PLACES["beside the projections"]),
        ([f"{ATTENTIONS[1]}.k_zero_point"], ("k_scale", "v_scale", "k_zero_point", "v_zero_point")),
    ],
)
def test_absent_scales(names: list[str], places: tuple[str, ...], tmp_path: Path) -> None:
    """Each is named as the writer would call it."""
    found = with_cache(asymmetric(INT8_STATIC) if len(places) > 2 else INT8_STATIC, places)
    for name in names:
        del found.tensors[name]
    with pytest.raises(LayerResolutionError) as raised:
        load(found, tmp_path)
    message = str(raised.value)
    assert f"{len(names)} of its scales are absent" in message
    assert f"found: no {', '.join(names)}\n" in message
    assert f"where: config.json: {PLACE}\n" in message


def test_no_scales_at_all(tmp_path: Path) -> None:
    with pytest.raises(LayerResolutionError, match="4 of its scales are absent"):
        load(content(kv_cache_scheme=FP8_STATIC), tmp_path)


def test_arguments_that_the_library_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=rf"{PLACE}\.type: .*'of stone'"):
        load(with_cache({"num_bits": 99, "type": "of stone"}), tmp_path)


def test_queries_that_are_quantised_too(tmp_path: Path) -> None:
    """An attention group asks for more than a cache."""
    attention = group(None, FP8_STATIC, ["Qwen3Attention"])
    found = with_cache(FP8_STATIC)
    found.section["config_groups"]["group_1"] = attention
    with pytest.raises(UnsupportedSchemeError, match="activations alone, of Qwen3Attention"):
        load(found, tmp_path)
