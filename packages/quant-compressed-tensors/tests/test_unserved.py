"""What a section asks for and nobody here acts on is refused by name; what asks for nothing is served."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_folders import FP8, FP8_STATIC, FP8_TOKEN, INT8_STATIC, group, section

from quant_compressed_tensors.section import Section
from quant_compressed_tensors.unserved import unserved_parts
from quant_core import CheckpointError, CheckpointFolder, UnsupportedSchemeError

PLACE = "quantization_config"


def read(path: Path, given: dict[str, Any]) -> Section:
    (path / "config.json").write_text(json.dumps({PLACE: given}))
    return Section.read(CheckpointFolder(path))


def complaints(path: Path, given: dict[str, Any]) -> list[str]:
    """What the section asks for in vain."""
    return [str(finding) for finding in unserved_parts(read(path, given))]


@pytest.mark.parametrize("asks", [True, "true", 1, 0.9, {"ratio": 0.5}])
def test_activations_that_are_clipped(asks: Any, tmp_path: Path) -> None:
    (message,) = complaints(tmp_path, section(group(activation_use_clip=asks)))
    assert f"where: config.json: {PLACE}.config_groups.group_0.activation_use_clip\n" in message
    assert "clipped" in message
    assert "what to do: " in message


@pytest.mark.parametrize("asks", [False, "false", None, "null"])
def test_activations_that_are_not_clipped(asks: Any, tmp_path: Path) -> None:
    assert complaints(tmp_path, section(group(activation_use_clip=asks), group(activation_use_clip=asks))) == []


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("weight_block_size", [128, 128], "block_structure"),
        ("li_cache_scheme", {"num_bits": 8, "type": "int"}, "lightning indexer"),
        ("comp_cache_scheme", {"num_bits": 8, "type": "float"}, "compressed keys"),
        ("moe_sparsity_config", {"method": "prune", "num_experts": [None, 64, 48]}, "different numbers of experts"),
    ],
)
def test_keys_that_ask_for_what_nobody_does(key: str, value: Any, what: str, tmp_path: Path) -> None:
    parsed = read(tmp_path, section(**{key: value}))
    (finding,) = unserved_parts(parsed)
    assert finding.error is UnsupportedSchemeError
    assert f"{PLACE}.{key}" in str(finding)
    assert what in str(finding)
    assert finding.found == str(value)


@pytest.mark.parametrize(
    "value", [None, "null", {}, [], False, {"method": None, "num_experts": [None, None]}, {"a": {"b": ["none"]}}]
)
@pytest.mark.parametrize("key", ["weight_block_size", "li_cache_scheme", "moe_sparsity_config", "some_new_key"])
def test_keys_that_ask_for_nothing(key: str, value: Any, tmp_path: Path) -> None:
    assert complaints(tmp_path, section(**{key: value})) == []


# --- what nobody acts on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "key", "near"),
    [
        (section(kv_cache_schema={"num_bits": 8}), f"{PLACE}.kv_cache_schema", "'kv_cache_scheme'?"),
        (section(ignored=["lm_head"]), f"{PLACE}.ignored", "'ignore'?"),
        (section(zebra=1), f"{PLACE}.zebra", "one of config_groups, ignore"),
        (section(group(target=["x"])), f"{PLACE}.config_groups.group_0.target", "'targets'?"),
        (section(group(input_activation={"num_bits": 8})), "group_0.input_activation", "'input_activations'?"),
    ],
)
def test_unknown_keys(given: dict[str, Any], key: str, near: str, tmp_path: Path) -> None:
    (finding,) = unserved_parts(read(tmp_path, given))
    assert finding.error is CheckpointError
    assert f"has a key that nobody reads: {PLACE}." in finding.what
    assert key in finding.what
    assert near in (finding.expected or "")
    assert finding.todo


@pytest.mark.parametrize(
    "sparsity",
    [
        {},
        None,
        {"format": "dense", "global_sparsity": 0.03, "ignore": [], "sparsity_structure": "unstructured", "targets": []},
        {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"]},
        {"format": None, "targets": None},
    ],
)
def test_sparsity_that_is_not_sparse(sparsity: Any, tmp_path: Path) -> None:
    """With zeros in their places, weights are as any other, whatever is targeted."""
    assert complaints(tmp_path, section(sparsity_config=sparsity)) == []


@pytest.mark.parametrize(
    "sparsity",
    [
        {"format": "sparse-24-bitmask", "targets": ["Linear"]},
        {"format": "sparse-bitmask", "targets": []},
        {"format": "marlin-24"},
        {"targets": ["Linear"], "sparsity_structure": "2:4"},  # says not how
        "2:4",
        ["sparse-bitmask"],
    ],
)
def test_sparsity_that_is_sparse(sparsity: Any, tmp_path: Path) -> None:
    (message,) = complaints(tmp_path, section(sparsity_config=sparsity))
    assert f"where: config.json: {PLACE}.sparsity_config\n" in message
    assert "without their zeros" in message
    assert "disable_sparse_compression" in message


def transform(*locations: str, **more: Any) -> dict[str, Any]:
    applied = [{"targets": ["re:.*down_proj$"], "location": location, "inverse": False} for location in locations]
    return {"config_groups": {"R1": {"type": "hadamard", "apply": applied, **more}}}


@pytest.mark.parametrize(
    "config",
    [
        {},
        None,
        {"config_groups": {}},
        {"config_groups": None},
        transform(),
        transform("weight_input"),
        transform("weight_output", "weight_input", head_dim=32, precision="torch.float64"),
    ],
)
def test_transforms_that_are_in_the_weights_already(config: Any, tmp_path: Path) -> None:
    assert complaints(tmp_path, section(transform_config=config)) == []


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache", "somewhere"])
def test_transforms_at_run_time(location: str, tmp_path: Path) -> None:
    (message,) = complaints(tmp_path, section(transform_config=transform("weight_input", location)))
    assert f"a transform of {location} at run time" in message
    assert f"where: config.json: {PLACE}.transform_config.config_groups.R1\n" in message
    assert "SpinQuant: R1 and R2 only" in message


@pytest.mark.parametrize(
    "config",
    [
        {"expert_substitution": {"layers": [1, 2]}},
        {"config_groups": [{"apply": [{"location": "input"}]}]},
        {"config_groups": {"R1": "hadamard"}},
        {"config_groups": {"R1": {"type": "hadamard", "apply": ["input"]}}},
        {"config_groups": {"R1": {"type": "hadamard"}}},
        "hadamard",
        [transform("input")],
    ],
)
def test_transforms_of_another_shape(config: Any, tmp_path: Path) -> None:
    """Whatever asks for something and is not understood is no reason for silence."""
    (message,) = complaints(tmp_path, section(transform_config=config))
    assert f"{PLACE}.transform_config" in message
    assert "what to do: " in message


def test_quantised_outputs(tmp_path: Path) -> None:
    (message,) = complaints(tmp_path, section(group(output_activations=INT8_STATIC)))
    assert f"where: config.json: {PLACE}.config_groups.group_0.output_activations\n" in message
    assert "quantise without output_activations" in message


def test_attention_groups(tmp_path: Path) -> None:
    """Their queries are quantised, which weights say nothing of."""
    attention = group(None, FP8_STATIC, ["Qwen3Attention"], format="dense")
    (message,) = complaints(tmp_path, section(group(FP8, FP8_TOKEN), attention))
    assert f"{PLACE}.config_groups.group_1.input_activations\n" in message
    assert "activations alone, of Qwen3Attention" in message


@pytest.mark.parametrize(
    "name", ["sparse-bitmask", "sparse-24-bitmask", "marlin-24", "int-quantised", "mxfp5-quantized"]
)
def test_formats_that_nobody_reads(name: str, tmp_path: Path) -> None:
    """Of the whole checkpoint, where the library takes any text."""
    (message,) = complaints(tmp_path, section(format=name))
    assert f"where: config.json: {PLACE}.format\n" in message
    assert name in message
    assert "what to do: " in message


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "marlin-24"])
def test_formats_of_one_group_that_nobody_reads(name: str, tmp_path: Path) -> None:
    """A newer library may not know the name any more, and then refuses it itself."""
    try:
        message = "\n".join(complaints(tmp_path, section(group(format=name))))
    except CheckpointError as error:
        message = str(error)
    assert f"{PLACE}.config_groups.group_0.format" in message
    assert name in message
