"""What is wrong with a folder and can be said from names, shapes and dtypes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant_core import (
    CheckpointError,
    CheckpointFolder,
    LayerResolutionError,
    LoadError,
    QuantError,
    UnsupportedSchemeError,
    list_schemes,
)
from quant_modelslim import ModelSlimFormat

Q, OUT, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
WEIGHTS, DESCRIPTION = "quant_model_weights.safetensors", "quant_model_description.json"


def refused(content: Any, folder: Path, kind: type[QuantError], *said: str) -> str:
    """The message with which a folder of this content is refused; each of `said` is in it."""
    with pytest.raises(QuantError) as raised:
        ModelSlimFormat.load(CheckpointFolder(content.write(folder)))
    message = str(raised.value)
    assert type(raised.value) is kind, message
    for text in said:
        assert text in message, message
    return message


def test_a_sound_folder(tmp_path: Path, small: Any) -> None:
    assert ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path))).description.types


def test_types_that_nobody_registered(tmp_path: Path, small: Any) -> None:
    """The error lists the layers of each, the types that exist for that kind of layer, and the nearest name."""
    for suffix in ("weight", "weight_scale", "weight_offset"):
        small.description[f"{Q}.{suffix}"] = "W8A8_DYNAMICS"
        small.description[f"{DOWN}.{suffix}"] = "W3A3"
    small.description["model.layers.0.self_attn.k_proj.kv_cache_scale"] = "C9"
    small.description["model.layers.1.self_attn.quant_type"] = "INT3"
    message = refused(
        small,
        tmp_path,
        UnsupportedSchemeError,
        f"'W8A8_DYNAMICS' on linear layers\n  where: {DESCRIPTION}: {Q}.weight\n",
        "the nearest name is 'W8A8_DYNAMIC'",
        f"'W3A3' on linear layers\n  where: {DESCRIPTION}: {DOWN}.weight\n",
        "'C9' on attention layers",
        "model.layers.0.self_attn.k_proj.kv_cache_scale",
        "'INT3' on attention layers",
        "model.layers.1.self_attn.quant_type",
    )
    linear = sorted(quant_type for quant_type, layer_type in list_schemes() if layer_type == "linear")
    assert f"one of {', '.join(linear)}" in message


def test_many_layers_of_an_unknown_type_are_counted(tmp_path: Path, small: Any) -> None:
    for i in range(100):
        small.description[f"model.layers.{i}.mlp.up_proj.weight"] = "W3A3"
    message = refused(small, tmp_path, UnsupportedSchemeError, "and 92 more")
    assert len(message) < 2000


def test_a_linear_type_is_no_attention_type(tmp_path: Path, small: Any) -> None:
    small.description["model.layers.0.self_attn.quant_type"] = "W8A8"
    refused(
        small, tmp_path, UnsupportedSchemeError, "'W8A8' on attention layers", "'W8A8' exists for linear, moe layers"
    )


def test_described_but_not_in_the_files(tmp_path: Path, small: Any) -> None:
    del small.tensors[f"{Q}.weight"], small.tensors[f"{OUT}.weight_scale"]
    refused(
        small,
        tmp_path,
        CheckpointError,
        "contradict each other in 2 places",
        f"{Q}.weight is described as W8A8_DYNAMIC, but no file holds it",
        f"{OUT}.weight_scale is described as W8A8_DYNAMIC, but no file holds it",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_described_as_float(tmp_path: Path, small: Any, dtype: torch.dtype) -> None:
    for suffix in ("weight", "weight_scale", "weight_offset"):
        small.description[f"{OUT}.{suffix}"] = "FLOAT"
    small.tensors[f"{OUT}.weight"] = small.tensors[f"{OUT}.weight"].to(torch.float32).to(dtype)
    name = str(dtype).removeprefix("torch.")
    refused(small, tmp_path, CheckpointError, f"{OUT}.weight is described as FLOAT, but {WEIGHTS} holds {name}")


def test_floats_described_as_codes(tmp_path: Path, small: Any) -> None:
    small.tensors[f"{OUT}.weight"] = small.tensors[f"{OUT}.weight"].to(torch.bfloat16)
    refused(small, tmp_path, LoadError, f"{OUT}.weight in {WEIGHTS} is bfloat16 [32, 32], expected int8 [32, 32]")


def test_a_norm_described_as_codes(tmp_path: Path, small: Any) -> None:
    small.description["model.norm.weight"] = "W8A8"
    refused(small, tmp_path, LoadError, "model.norm", "weight [32]")


@pytest.mark.parametrize(
    ("name", "change", "found", "expected"),
    [
        (f"{OUT}.weight_scale", lambda t: t[:-1], "float32 [31, 1]", "float32 [32, 1]"),
        (f"{OUT}.weight_scale", lambda t: t.flatten(), "float32 [32]", "float32 [32, 1]"),
        (f"{OUT}.weight_scale", lambda t: t.to(torch.int32), "int32 [32, 1]", "float32 [32, 1]"),
        (f"{OUT}.weight_offset", lambda t: t[:1], "float32 [1, 1]", "float32 [32, 1]"),
        (f"{Q}.bias", lambda t: t[:3], "float32 [3]", "[32] of a float dtype"),
        (f"{Q}.weight", lambda t: t[:5], "float32 [32]", "[5] of a float dtype"),
        ("model.layers.1.self_attn.o_proj.deq_scale", lambda t: t.double(), "float64 [32]", "float32 [32]"),
        ("model.layers.1.self_attn.o_proj.quant_bias", lambda t: t.long(), "int64 [32]", "int32 [32]"),
        ("model.layers.1.self_attn.o_proj.input_scale", lambda t: t.repeat(2), "float32 [2]", "float32 [1]"),
        (f"{DOWN}.weight_offset", lambda t: t.repeat(1, 4), "float32 [32, 4]", "float32 [32, 1]"),
    ],
)
def test_another_form_than_the_type_has(
    tmp_path: Path, small: Any, name: str, change: Any, found: str, expected: str
) -> None:
    """The error names file, tensor, what was found and what was expected."""
    small.tensors[name] = change(small.tensors[name]).clone()
    refused(small, tmp_path, LoadError, name.rpartition(".")[0], WEIGHTS, f"is {found}, expected {expected}")


def test_a_bias_of_integers(tmp_path: Path, small: Any) -> None:
    small.tensors[f"{Q}.bias"] = small.tensors[f"{Q}.bias"].int()
    refused(small, tmp_path, CheckpointError, f"{Q}.bias is described as FLOAT, but {WEIGHTS} holds int32")
    del small.description[f"{Q}.bias"]
    refused(small, tmp_path, CheckpointError, f"{Q}.bias has no key in {DESCRIPTION}, but {WEIGHTS} holds int32")


def test_groups_that_do_not_divide_the_input(tmp_path: Path, small: Any) -> None:
    for suffix in ("weight_scale", "weight_offset"):
        small.tensors[f"{OUT}.{suffix}"] = small.tensors[f"{OUT}.{suffix}"].repeat(1, 3)
    said = f"{OUT}.weight_scale in {WEIGHTS} is [32, 3], expected [32, a divisor of 32]"
    refused(small, tmp_path, UnsupportedSchemeError, OUT, "W8A8_DYNAMIC", "cannot be cut into 3 equal groups", said)


def test_groups_that_do_not_fit(tmp_path: Path, small: Any) -> None:
    for suffix in ("weight_scale", "weight_offset"):
        small.tensors[f"{DOWN}.{suffix}"] = small.tensors[f"{DOWN}.{suffix}"].repeat(1, 5)
    refused(small, tmp_path, UnsupportedSchemeError, DOWN, "64 input features cannot be cut into 5 equal groups")


def test_a_tensor_that_no_type_has(tmp_path: Path, small: Any) -> None:
    """Dropping it would change the results."""
    small.tensors[f"{DOWN}.other_rotation"] = torch.eye(4)
    refused(small, tmp_path, LoadError, f"{DOWN}.other_rotation in {WEIGHTS} is not used by this type")


def test_layers_that_fail_alike_are_reported_together(tmp_path: Path, small: Any) -> None:
    for module in (Q, OUT):
        small.tensors[f"{module}.weight_scale"] = small.tensors[f"{module}.weight_scale"].double().int()
    message = refused(small, tmp_path, LoadError, "q_proj", "o_proj")
    assert message.count("expected float32") == 2  # of different forms, since q has a bias
    small.drop(f"{Q}.bias")
    message = refused(small, tmp_path, LoadError, "q_proj", "o_proj", "also: ")
    assert message.count("expected float32") == 1


def test_quantised_weights_without_a_key(tmp_path: Path, small: Any) -> None:
    """The error has the layer, the keys looked for, the nearest ones, and what else the folder looks like."""
    for key in [key for key in small.description if key.startswith((Q, OUT))]:
        del small.description[key]
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "other"}}')
    refused(
        small,
        tmp_path,
        LayerResolutionError,
        "does not mention 2 quantised weights",
        f"{Q}.weight (int8 in {WEIGHTS})",
        f"expected: the keys {OUT}.weight, {Q}.weight",
        "the nearest keys are model.layers.1.self_attn.o_proj.weight, model.layers.0.self_attn.",
        "looks like another format: config.json declares the method 'other'",
    )


def test_two_types_in_one_module(tmp_path: Path, small: Any) -> None:
    """Two types may store the same tensors, so only the description itself shows that it is wrong."""
    small.description[f"{OUT}.weight"] = "W8A16"
    refused(
        small,
        tmp_path,
        CheckpointError,
        f"{OUT}.weight is described as W8A16, {OUT}.weight_scale is described as W8A8_DYNAMIC",
    )


def test_a_wrapper_that_smooths(tmp_path: Path, small: Any) -> None:
    for suffix in ("weight", "weight_scale", "weight_offset"):
        small.tensors[f"{OUT}.linear.{suffix}"] = small.tensors.pop(f"{OUT}.{suffix}")
        small.description[f"{OUT}.linear.{suffix}"] = small.description.pop(f"{OUT}.{suffix}")
    small.tensors[f"{OUT}.div.mul_scale"] = torch.ones(32)
    small.description[f"{OUT}.div.mul_scale"] = "FLOAT"
    refused(small, tmp_path, UnsupportedSchemeError, "smoothed by a stored factor", OUT, "NonFusionSmoothQuant")


@pytest.mark.parametrize("section", ["metadata", "optional"])
def test_rotations_that_are_not_there(tmp_path: Path, small: Any, section: str) -> None:
    """They have no key of their own: without them the layer would compute something else, without a word."""
    rotated = {"heads_rotation": {"layers": [OUT]}, "kronecker_rotation": {"layers": [DOWN]}}
    small.description[section] = {"quarot": {"max_tp_size": 1, **rotated}}
    refused(
        small,
        tmp_path,
        CheckpointError,
        "3 places",
        f"{OUT}.heads_rotation is needed at run time, but no file holds it",
        f"{DOWN}.kronecker_rotation_m is needed",
        f"{DOWN}.kronecker_rotation_n is needed",
    )


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b"])
def test_a_rotation_outside_the_folder(tmp_path: Path, small: Any, file: str) -> None:
    small.description["optional"] = {"quarot": {"rotation_map": {"global_rotation": file}}}
    refused(small, tmp_path, CheckpointError, f"{DESCRIPTION} names a file outside the folder", repr(file))


def test_a_rotation_inside_the_folder(tmp_path: Path, small: Any) -> None:
    small.description["optional"] = {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path)))


def seconds(content: dict[str, str], folder: Path) -> float:
    """Processor time in which a folder with this description and no such weights is refused."""
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "quant_model_weights.safetensors")
    (folder / DESCRIPTION).write_text(json.dumps(content))
    start = time.process_time()
    with pytest.raises(QuantError):
        ModelSlimFormat.load(CheckpointFolder(folder))
    return time.process_time() - start


HOSTILE = {
    "as many types as keys": lambda n: {f"layers.{i}.weight": f"T{i}" for i in range(n)},
    "long types": lambda n: {"layers.0.weight": "T" * 20 * n},
    "long names": lambda n: {f"layers.{'a' * 20 * n}.weight": "W8A8"},
    "absent weights": lambda n: {f"layers.{i}.weight": "W8A8" for i in range(n)},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_folder_is_answered_in_time_proportional_to_its_bytes(kind: str, tmp_path: Path) -> None:
    """Ten times the bytes take no hundred times as long; ratios, since no machine is like another."""
    make = HOSTILE[kind]
    seconds(make(10), tmp_path / "first")  # what is made once
    small = max(seconds(make(1000), tmp_path / "small"), 0.01)
    assert seconds(make(10_000), tmp_path / "large") < 50 * small
