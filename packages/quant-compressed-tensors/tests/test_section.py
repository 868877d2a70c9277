"""The section of config.json: where it stands, what its dialects mean, and what cannot be parsed."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_folders import (
    FP8,
    FP8_TOKEN,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    arguments,
    group,
    grouped,
    section,
)

from quant_compressed_tensors.section import Section, find_section
from quant_compressed_tensors.unserved import unserved_parts
from quant_core import CheckpointError, CheckpointFolder

PLACE = "quantization_config"


def folder(path: Path, config: dict[str, Any]) -> CheckpointFolder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return CheckpointFolder(path)


def read(path: Path, given: dict[str, Any]) -> Section:
    return Section.read(folder(path, {PLACE: given}))


def unreadable(path: Path, given: dict[str, Any], *said: str) -> str:
    """The message for a section that cannot be parsed."""
    with pytest.raises(CheckpointError) as raised:
        read(path, given)
    message = str(raised.value)
    assert "config.json has a section that compressed-tensors" in message
    assert "where: config.json\n" in message
    assert "what to do: " in message
    for text in said:
        assert text in message, message
    return message


def complaints(path: Path, given: dict[str, Any]) -> list[str]:
    """What the section asks for in vain."""
    return [str(finding) for finding in unserved_parts(read(path, given))]


def outcome(path: Path, given: dict[str, Any]) -> str:
    """What is wrong with a section, whoever says so."""
    try:
        return "\n".join(complaints(path, given))
    except CheckpointError as error:
        return str(error)


# --- where it stands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"quantization_config": section()}, "quantization_config"),
        ({"compression_config": section()}, "compression_config"),
        ({"text_config": {"quantization_config": section()}}, "text_config.quantization_config"),
        ({"text_config": {"compression_config": section()}}, "text_config.compression_config"),
        ({"quantization_config": section(), "compression_config": section(ignore=[])}, "quantization_config"),
        ({"quantization_config": section(quant_method="compressed_tensors")}, "quantization_config"),
        ({"quantization_config": section(quant_method="Compressed-Tensors")}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8"}, "compression_config": section()}, "compression_config"),
    ],
)
def test_where_it_stands(config: dict[str, Any], place: str, tmp_path: Path) -> None:
    found = find_section(folder(tmp_path, config))
    assert found is not None
    assert found[0] == place
    parsed = Section.read(folder(tmp_path, config))
    assert (parsed.place, parsed.ignore) == (place, ("lm_head",))
    assert parsed.key("ignore") == f"{place}.ignore"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": ["compressed-tensors"]}},
        {"quantization_config": [section()]},
        {"quantization_config": "compressed-tensors"},
        # Without quantisation: transforms of experts (vLLM 0.33).
        {"compression_config": {"transform_config": {"expert_substitution": {"layers": [1]}}}},
        {"compression_config": {key: value for key, value in section().items() if key != "quant_method"}},
        {"text_config": [{"quantization_config": section()}]},
        {"vision_config": {"quantization_config": section()}},
    ],
)
def test_what_is_not_ours(config: dict[str, Any], tmp_path: Path) -> None:
    assert find_section(folder(tmp_path, config)) is None
    with pytest.raises(CheckpointError, match="no compressed-tensors checkpoint") as raised:
        Section.read(folder(tmp_path, config))
    assert "serve it without --quantization" in str(raised.value)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_what_is_parsed(tmp_path: Path) -> None:
    second = group(FP8, FP8_TOKEN, ["re:.*down_proj$", "lm_head"], format="float-quantized")
    parsed = read(tmp_path, section(group(), second, ignore=["re:.*gate$"], format="mixed-precision"))
    assert list(parsed.groups) == ["group_0", "group_1"]
    assert parsed.groups["group_1"].targets == ["re:.*down_proj$", "lm_head"]
    assert parsed.groups["group_0"].weights.strategy == "channel"
    assert (parsed.ignore, parsed.format) == (("re:.*gate$",), "mixed-precision")


def test_each_target_with_its_scheme(tmp_path: Path) -> None:
    """In the shape in which vLLM's own configuration has it; of one target in two groups, the last counts."""
    groups = group(targets=["Linear", "lm_head"]), group(FP8, None, ["lm_head"], format="naive-quantized")
    schemes = read(tmp_path, section(*groups)).target_scheme_map
    assert list(schemes) == ["Linear", "lm_head"]
    assert schemes["Linear"]["weights"].type == "int"
    assert schemes["Linear"]["input_activations"].strategy == "token"
    assert schemes["Linear"]["format"] == "int-quantized"
    assert schemes["lm_head"]["weights"].type == "float"
    assert schemes["lm_head"]["input_activations"] is None
    assert schemes["lm_head"]["format"] == "naive-quantized"


def test_what_is_absent_is_null(tmp_path: Path) -> None:
    """Newer libraries leave out what is null (0.20), older ones had no version and no format of a group (0.10)."""
    terse = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    given = {"quant_method": "compressed-tensors", "config_groups": {"W8A8": {"targets": ["Linear"], "weights": terse}}}
    parsed = read(tmp_path, given)
    assert parsed.groups["W8A8"].input_activations is None
    assert (parsed.ignore, list(unserved_parts(parsed))) == ((), [])
    assert read(tmp_path, {**given, "ignore": None}).ignore == ()


@pytest.mark.parametrize(("size", "strategy"), [(None, "tensor"), (-1, "channel"), (32, "group")])
def test_a_strategy_that_old_writers_left_out(size: int | None, strategy: str, tmp_path: Path) -> None:
    given = section(group({"num_bits": 8, "type": "int", "symmetric": True, "group_size": size}, None))
    assert read(tmp_path, given).groups["group_0"].weights.strategy == strategy


def test_blocks_as_old_writers_spelled_them(tmp_path: Path) -> None:
    given = section(group(arguments(strategy="block", block_structure="128x64", type="float"), None))
    assert read(tmp_path, given).groups["group_0"].weights.block_structure == [128, 64]


def test_a_preset_in_place_of_a_group(tmp_path: Path) -> None:
    """The key is the preset's name, the value its targets."""
    given = section()
    given["config_groups"] = {"W4A16": ["re:.*mlp.*"], "group_1": group(targets=["re:.*attn.*"])}
    parsed = read(tmp_path, given)
    assert parsed.groups["W4A16"].weights.num_bits == 4
    assert parsed.groups["W4A16"].targets == ["re:.*mlp.*"]
    assert list(unserved_parts(parsed)) == []


def test_a_preset_that_nobody_knows(tmp_path: Path) -> None:
    given = section()
    given["config_groups"] = {"W9A9": ["Linear"]}
    unreadable(tmp_path, given, "quantization_config.config_groups", "W9A9", "W4A16")


@pytest.mark.parametrize("order", [None, False, True, "weight", "static", "group", "dynamic"])
def test_every_order_of_columns_that_a_writer_had(order: Any, tmp_path: Path) -> None:
    """Newer libraries refuse what older ones wrote; what it changed shows in the tensors."""
    parsed = read(tmp_path, section(group({**grouped(INT8), "actorder": order}, None)))
    assert parsed.groups["group_0"].weights.group_size == 32
    assert list(unserved_parts(parsed)) == []


def test_an_order_of_columns_that_no_writer_had(tmp_path: Path) -> None:
    given = section(group({**grouped(INT8), "actorder": "columns"}, None))
    unreadable(tmp_path, given, f"{PLACE}.config_groups.group_0.weights.actorder", "'columns'")


# --- dialects ---------------------------------------------------------------------------------------------------------


def test_null_true_and_false_as_strings(tmp_path: Path) -> None:
    """As writers for Ascend have them."""
    spelled = group(
        {**INT8, "symmetric": "true", "group_size": "null", "dynamic": "False", "actorder": "None", "observer": "null"},
        {**INT8_TOKEN, "dynamic": "True", "block_structure": "null"},
        output_activations="null",
    )
    given = section(spelled, kv_cache_scheme="null", sparsity_config="null", transform_config="none")
    parsed = read(tmp_path, given)
    plain = read(tmp_path, section(group()))
    assert parsed.groups["group_0"].weights.symmetric is True
    assert parsed.groups["group_0"].input_activations == plain.groups["group_0"].input_activations
    assert parsed.groups["group_0"].output_activations is None
    assert list(unserved_parts(parsed)) == []


@pytest.mark.parametrize("part", ["weights", "input_activations"])
def test_bits_of_several_kinds_of_layers_at_once(part: str, tmp_path: Path) -> None:
    given = section(group())
    given["config_groups"]["group_0"][part]["num_bits"] = {"self_attn.o_proj": 8, "mlp.experts": 4}
    unreadable(tmp_path, given, f"{PLACE}.config_groups.group_0.{part}.num_bits: Input should be a valid integer")


# --- what the library refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("weights", "strategy", "row"),
        ("weights", "type", "complex"),
        ("weights", "num_bits", "eight"),
        ("weights", "num_bits", None),
        ("weights", "num_bits", 8.5),
        ("weights", "symetric", True),
        ("weights", "num_bit", 8),
        ("weights", "group_size", -2),
        ("weights", "group_size", "many"),
        ("weights", "block_structure", [128]),
        ("weights", "block_structure", "128"),
        ("weights", "dynamic", "sometimes"),
        ("weights", "scale_dtype", "torch.uint9"),
        ("input_activations", "strategy", "row"),
        ("input_activations", "group", 32),
        ("input_activations", "dynamic", "local"),
        ("output_activations", "num_bits", []),
    ],
)
def test_arguments_that_cannot_be_parsed(part: str, key: str, value: Any, tmp_path: Path) -> None:
    """The message has the key with its path, whatever the library raised."""
    given = section(group(output_activations=dict(INT8_STATIC)))
    given["config_groups"]["group_0"][part][key] = value
    unreadable(tmp_path, given, f"{PLACE}.config_groups.group_0.{part}")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (arguments(strategy="group"), "group_size"),
        (arguments(strategy="channel", group_size=32), "group_size"),
        (arguments(strategy="block"), "block"),
        (arguments(strategy="token"), "token"),
        (arguments(6, type="float"), ""),  # older libraries: a bare NotImplementedError
        (arguments(16, type="float"), ""),
    ],
)
def test_arguments_that_contradict_each_other(weights: dict[str, Any], said: str, tmp_path: Path) -> None:
    message = outcome(tmp_path, section(group(weights, None)))
    if weights["num_bits"] == 6 and message == "":
        return  # newer libraries know six bits, and the table of combinations refuses them
    assert f"{PLACE}.config_groups.group_0.weights" in message
    assert said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config_groups", None),
        ("config_groups", []),
        ("config_groups", {"group_0": None}),
        ("config_groups", {"group_0": "Linear"}),
        ("config_groups", {"group_0": {"weights": INT8}}),
        ("config_groups", {"group_0": {"targets": "Linear", "weights": INT8}}),
        ("config_groups", {"group_0": {"targets": [1], "weights": INT8}}),
        ("config_groups", {"group_0": {"targets": ["Linear"], "weights": [8]}}),
        ("config_groups", {"group_0": group(format="mixed-precision")}),
        ("config_groups", {"group_0": group(format="quantized")}),
        ("ignore", "lm_head"),
        ("ignore", {"lm_head": True}),
        ("ignore", [None]),
        ("ignore", [["lm_head"]]),
        ("format", ["int-quantized"]),
        ("quantization_status", "melted"),
        ("global_compression_ratio", "much"),
    ],
)
def test_sections_that_cannot_be_parsed(key: str, value: Any, tmp_path: Path) -> None:
    unreadable(tmp_path, {**section(), key: value}, f"{PLACE}.{key}")


def test_every_complaint_at_once(tmp_path: Path) -> None:
    given = section(group({**INT8, "num_bit": 8}, {**INT8_TOKEN, "type": "x"}), ignore=[1])
    unreadable(tmp_path, given, "group_0.weights.num_bit", "group_0.input_activations.type", f"{PLACE}.ignore.0")


def test_a_version_that_is_newer_than_the_library(tmp_path: Path) -> None:
    given = section(group({**INT8, "new_key": 1}), version="7.1.0")
    message = unreadable(
        tmp_path, given, "group_0.weights.new_key", "what to do: install compressed-tensors 7.1.0 or newer"
    )
    assert "correct config.json" not in message


@pytest.mark.parametrize("version", ["0.9.4", None, "", "new", 0.1, ["7.1.0"]])
def test_a_version_that_says_nothing(version: Any, tmp_path: Path) -> None:
    given = section(group({**INT8, "new_key": 1}), version=version)
    unreadable(tmp_path, given, "new_key", "correct config.json, or quantise the model again")


def test_a_newer_version_with_nothing_new(tmp_path: Path) -> None:
    assert complaints(tmp_path, section(version="7.1.0")) == []


@pytest.mark.parametrize("depth", [20, 100, 900])
@pytest.mark.parametrize("key", ["sparsity_config", "observer_kwargs", "some_new_key"])
def test_values_that_are_nested_deeply(key: str, depth: int, tmp_path: Path) -> None:
    nested: Any = 1
    for _ in range(depth):
        nested = {"a": nested}
    given = section()
    (given["config_groups"]["group_0"]["weights"] if key == "observer_kwargs" else given)[key] = nested
    message = outcome(tmp_path, given)
    assert key == "observer_kwargs" or f"{PLACE}" in message
    assert ("nested deeper than 50 levels" in message) == (depth > 50)
