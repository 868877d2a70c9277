"""The description file: what every writer writes, and what is no description."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quant_core import CheckpointError, CheckpointFolder
from quant_modelslim import Description

NAME = "quant_model_description.json"
TYPES = {"model.layers.0.mlp.up_proj.weight": "W8A8_DYNAMIC", "model.norm.weight": "FLOAT"}


def parse(content: object) -> Description:
    return Description.parse(content, NAME)


def test_keys_are_split() -> None:
    attention = {"model.layers.0.self_attn.quant_type": "INT8", "model.layers.0.self_attn.indexer.quant_type": "FP8"}
    read = parse({**TYPES, **attention, "version": "1.0.0", "model_quant_type": "W8A8", "group_size": 64})
    assert read.types == TYPES
    assert read.attention_types == {"model.layers.0.self_attn": "INT8", "model.layers.0.self_attn.indexer": "FP8"}
    assert (read.keys.version, read.keys.model_quant_type, read.keys.group_size) == ("1.0.0", "W8A8", 64)


@pytest.mark.parametrize(
    "general",
    [
        {},
        {"version": "1.0.0", "model_quant_type": "W8A8", "group_size": 0, "metadata": {}, "optional": {}},
        {"version": None, "group_size": None, "metadata": None, "optional": None, "max_supported_tp": None},
        {"fa_quant_type": None, "kv_quant_type": None, "kv_cache_type": None},
        {"model_quant_type": "Unknown", "reduce_quant_type": "per_channel", "is_rot_used": True},
        {"a key of tomorrow": {"deep": [1, 2, {"er": None}]}, "another": "W8A8", "third": None, "fourth": 3.5},
        {
            "metadata": {"quarot": {"max_tp_size": 1}, "new": [1]},
            "optional": {"quarot": {"rotation_map": {}}, "new": 1},
        },
        {"version": "1.7"},
    ],
)
def test_global_keys_of_all_writers(general: dict[str, Any]) -> None:
    """Known ones, nulls, unknown ones and none at all; in front of the tensors' keys or behind."""
    assert parse({**general, **TYPES}).types == TYPES
    assert parse({**TYPES, **general}).types == TYPES


def test_null_for_a_tensor_is_no_key() -> None:
    assert parse({**TYPES, "model.layers.0.mlp.gate.weight": None}).types == TYPES


def test_a_prefix_before_every_key() -> None:
    """One adapter writes `thinker.` before the global keys too, the unknown ones included."""
    prefixed = {f"thinker.{key}": value for key, value in TYPES.items()}
    general = {"thinker.version": "1.0.0", "thinker.group_size": 64, "thinker.new": "W8A8", "thinker.list": [1]}
    read = parse({**prefixed, **general})
    assert read.types == prefixed
    assert (read.keys.version, read.keys.group_size) == ("1.0.0", 64)


def test_no_prefix_without_a_global_key_behind_it() -> None:
    """A model whose tensors all begin alike is not one whose keys have a prefix."""
    assert parse({"layer.weight": "W8A8", "layer.bias": "FLOAT"}).types == {
        "layer.weight": "W8A8",
        "layer.bias": "FLOAT",
    }
    with pytest.raises(CheckpointError, match=r"layer\.group_sizes: 3"):
        parse({"layer.weight": "W8A8", "layer.group_sizes": 3})


def test_rotations_are_read() -> None:
    rotated = {"heads_rotation": {"layers": ["a.o_proj"]}, "kronecker_rotation": {"layers": ["a.down_proj"]}}
    read = parse({**TYPES, "metadata": {"quarot": {"max_tp_size": 2, **rotated}}})
    assert read.keys.metadata is not None
    assert read.keys.metadata.quarot is not None
    assert read.keys.metadata.quarot.heads_rotation is not None
    assert read.keys.metadata.quarot.heads_rotation.layers == ("a.o_proj",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds a JSON list, expected an object"),
        ("W8A8", "holds a JSON str, expected an object"),
        (None, "holds a JSON NoneType, expected an object"),
        ({}, "describes no tensor.*an empty object"),
        ({"version": "1.0.0", "model_quant_type": "W8A8"}, "describes no tensor.*version, model_quant_type"),
        ({"a.weight": None}, "describes no tensor"),
        ({**TYPES, "a.weight": 8}, "a.weight: 8.*a name such as"),
        ({**TYPES, "a.weight": ""}, "a.weight: ''"),
        (
            {**TYPES, "a.weight": ["W8A8"], "b.weight": {}},
            r"gives 2 tensors something else than a type: a\.weight.*b\.weight",
        ),
        ({**TYPES, "version": "2.0.0"}, "is of version '2.0.0'.*expected: 1.x"),
        ({**TYPES, "version": "new"}, "is of version 'new'"),
        ({**TYPES, "version": 1}, "unusable values: version"),
        ({**TYPES, "group_size": "64"}, "unusable values: group_size.*not '64'"),
        ({**TYPES, "group_size": -1}, "unusable values: group_size"),
        ({**TYPES, "metadata": {"quarot": {"heads_rotation": {"layers": 3}}}}, "metadata.quarot.heads_rotation.layers"),
    ],
)
def test_no_description(content: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){said}") as raised:
        parse(content)
    assert NAME in str(raised.value)


def write(folder: Path, text: str, name: str = NAME) -> CheckpointFolder:
    (folder / name).write_text(text)
    return CheckpointFolder(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{", "is not valid JSON"),
        ('{"a.weight": "W8A8",}', "is not valid JSON"),
        ("<html>", "an HTML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ('{"a.weight": "W8A8", "b.weight": "FLOAT", "a.weight": "FLOAT"}', "keys more than once: a.weight"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a.weight": ' + "9" * 10_000 + "}", "is not valid JSON"),
    ],
    ids=lambda text: text[:20].strip() or "blank",
)
def test_no_json(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(NAME)}.*{said}"):
        Description.read(write(tmp_path, text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"a.weight": "\xff"}')
    with pytest.raises(CheckpointError, match=re.escape(NAME)):
        Description.read(CheckpointFolder(tmp_path))


def test_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"(?s)no ModelSlim checkpoint.*found: model\.safetensors.*without --quant"
    ):
        Description.read(CheckpointFolder(tmp_path))


@pytest.mark.parametrize("weights", ["quant_model_weights.safetensors", "quant_model_weight_w8a8.safetensors"])
def test_weights_that_lack_one(tmp_path: Path, weights: str) -> None:
    """The weights' name tells that one belongs to them."""
    (tmp_path / weights).touch()
    with pytest.raises(CheckpointError, match=rf"has {re.escape(weights)}, but no quant_model_description\*\.json"):
        Description.read(CheckpointFolder(tmp_path))


def test_none_but_another_method_is_declared(tmp_path: Path) -> None:
    """The error sends the user the right way."""
    folder = write(tmp_path, json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}), "config.json")
    with pytest.raises(CheckpointError, match=r"(?s)'compressed-tensors'.*serve it with --quantization compressed"):
        Description.read(folder)


def test_a_copy_under_another_name(tmp_path: Path) -> None:
    """People copy the description instead of renaming it; the order of its keys means nothing."""
    write(tmp_path, json.dumps(TYPES))
    folder = write(tmp_path, json.dumps(dict(reversed(TYPES.items())), indent=4), "quant_model_description_w8a8.json")
    assert Description.read(folder).types == TYPES


@pytest.mark.parametrize("other", [{**TYPES, "a.weight": "W8A16"}, {**TYPES, "new.weight": "FLOAT"}, {}, []])
def test_two_that_contradict_each_other(tmp_path: Path, other: Any) -> None:
    write(tmp_path, json.dumps(TYPES))
    folder = write(tmp_path, json.dumps(other), "quant_model_description_w8a8.json")
    with pytest.raises(
        CheckpointError, match=r"contradict each other: .*description\.json and .*_w8a8\.json"
    ) as raised:
        Description.read(folder)
    if other:
        changed = next(key for key in other if other[key] != TYPES.get(key))
        assert f"found: 1 keys with other values: {changed}" in str(raised.value)


@pytest.mark.parametrize("name", ["quant_model_description.json", "quant_model_description_w8a8_dynamic.json"])
def test_found_under_every_writers_name(tmp_path: Path, name: str) -> None:
    read = Description.read(write(tmp_path, json.dumps(TYPES), name))
    assert (read.file, read.types) == (name, TYPES)
