"""What a user can get wrong: files, values and section. Random damage ends in an error of ours, or is served."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_folders import (
    DTYPES,
    FP8_BLOCK,
    FP8_GROUP_128,
    HIDDEN,
    INT4,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    SIZES,
    Arguments,
    Content,
    arguments,
    asymmetric,
    at_run_time,
    content,
    group,
    grouped,
    section,
    stored,
    write_headers,
)

from quant_compressed_tensors import CompressedTensorsFormat
from quant_core import (
    AscendLinearScheme,
    CheckpointError,
    CheckpointFolder,
    LayerQuery,
    LoadError,
    QuantError,
    UnsupportedSchemeError,
)
from quant_core.schemes.params import Param
from quant_core.schemes.verify import check_values, linear_params

REPOSITORY = Path(__file__).parents[3]
CONFIGS = sorted((REPOSITORY / "testdata" / "checkpoints" / "llmcompressor").rglob("config.json"))

PLACE = "quantization_config"
QKV = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
UP = "model.layers.0.mlp.up_proj"


def refused(folder: Path, kind: type[QuantError], *said: str) -> str:
    """The message with which a folder is refused; each of `said` is in it."""
    with pytest.raises(QuantError) as raised:
        CompressedTensorsFormat.load(CheckpointFolder(folder))
    message = str(raised.value)
    assert type(raised.value) is kind, message
    for text in said:
        assert text in message, message
    return message


# --- files ------------------------------------------------------------------------------------------------------------


def test_no_weights(tmp_path: Path) -> None:
    content().write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, CheckpointError, "the folder has no *.safetensors file", "found: config.json")


def write_shards(found: Content, folder: Path) -> Path:
    """Two files and their index."""
    found.write(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{index + 1}-of-00002.safetensors" for index in range(2)]
    weight_map = {}
    for index, name in enumerate(names):
        part = dict(list(found.tensors.items())[index::2])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    folder = write_shards(content(), tmp_path)
    assert CompressedTensorsFormat.load(CheckpointFolder(folder)).modules[UP]
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, CheckpointError, "model-00002-of-00002.safetensors", "finish the download")


def test_a_stray_file(tmp_path: Path) -> None:
    """Without an index an engine loads whatever lies there."""
    folder = content().write(tmp_path)
    save_file({f"{UP}.weight": torch.zeros(1)}, folder / "old.safetensors")
    refused(folder, CheckpointError, f"two files hold the tensor {UP}.weight", "old.safetensors", "move the file")


def test_the_index_counts_where_there_is_one(tmp_path: Path) -> None:
    """A head of MTP joins a model in a file and an index of its own."""
    folder = write_shards(content(ignore=["lm_head", "re:^mtp.*"]), tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"mtp.fc.weight": torch.zeros(4, 4)}, folder / "model_mtp.safetensors")
    index["weight_map"]["mtp.fc.weight"] = "model_mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = CompressedTensorsFormat.load(CheckpointFolder(folder))
    assert read.layer_quant(LayerQuery("mtp.fc")).reason == "ignored by 're:^mtp.*'"
    index["weight_map"]["mtp.other.weight"] = "model_mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, CheckpointError, "mtp.other.weight", "model.safetensors.index.json")


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_weights_that_are_none(damage: bytes, tmp_path: Path) -> None:
    (content().write(tmp_path) / "model.safetensors").write_bytes(damage)
    refused(tmp_path, CheckpointError, "model.safetensors is not a readable safetensors file", "what to do: ")


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    file = content().write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, CheckpointError, "model.safetensors is not a readable safetensors file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "config.json is empty"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds no object"),
        ('{"a": 1, "a": 2}', "keys more than once: a"),
        ('{"quantization_config": ' + "[" * 100_000, "config.json is not valid JSON"),
    ],
)
def test_a_config_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    (content().write(tmp_path) / "config.json").write_text(text)
    refused(tmp_path, CheckpointError, said)


def test_no_config(tmp_path: Path) -> None:
    (content().write(tmp_path) / "config.json").unlink()
    refused(tmp_path, CheckpointError, "no compressed-tensors checkpoint", "expected: ", "what to do: ")


# --- the section ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (("config_groups", "group_0", "weights", "strategy", "rows"), CheckpointError, "group_0.weights"),
        (("config_groups", "group_0", "weights", "num_bits", 3), UnsupportedSchemeError, "quantise to 4 or 8 bits"),
        (("config_groups", "group_0", "weights", "type", "complex"), CheckpointError, "group_0.weights.type"),
        (("config_groups", "group_0", "format", "int-quantised"), CheckpointError, "config_groups.group_0.format"),
        (("format", "int-quantised"), UnsupportedSchemeError, f"{PLACE}.format"),
        (("config_groups", "group_0", "weights", "observer_kwarg", {}), CheckpointError, "weights.observer_kwarg"),
        (
            ("kv_cache_scheme", {"num_bits": 4}),
            UnsupportedSchemeError,
            "a key/value cache of int4 with scales per tensor",
        ),
        (("config_groups", "group_0", "output_activations", INT8_STATIC), UnsupportedSchemeError, "quantised outputs"),
        (("sparsity_config", {"format": "sparse-24-bitmask"}), UnsupportedSchemeError, "without their zeros"),
        (("config_groups", "group_0", "input_activations", None), None, ""),
    ],
)
def test_a_change_of_the_section(
    change: tuple[Any, ...], kind: type[QuantError] | None, said: str, tmp_path: Path
) -> None:
    *path, last, value = change
    found = content()
    inside: Any = found.section
    for key in path:
        inside = inside[key]
    inside[last] = value
    folder = found.write(tmp_path)
    if kind is None:  # weights without inputs are another type, which keeps them in bytes as well
        read = CompressedTensorsFormat.load(CheckpointFolder(folder))
        assert read.layer_quant(LayerQuery(UP)).quant_type == "W8A16"
    else:
        refused(folder, kind, said, "what to do: ")


def test_an_index_of_groups_that_a_scheme_cannot_follow(tmp_path: Path) -> None:
    """With the change of the recipe that avoids it."""
    found = content(group({**grouped(INT4), "actorder": "group"}, INT8_TOKEN))
    found.tensors[f"{UP}.weight_g_idx"] = torch.zeros(HIDDEN, dtype=torch.int32)
    said = UP, "weight_g_idx", f"{PLACE}.config_groups.group_0", "quantise with `actorder: weight`"
    refused(found.write(tmp_path), UnsupportedSchemeError, *said)


def test_an_index_of_groups_that_a_scheme_can_follow(tmp_path: Path) -> None:
    found = content(group({**grouped(INT4), "actorder": "group"}, None))
    found.tensors[f"{UP}.weight_g_idx"] = torch.zeros(HIDDEN, dtype=torch.int32)
    read = CompressedTensorsFormat.load(CheckpointFolder(found.write(tmp_path)))
    assert read.create_scheme_for_layer(LayerQuery(UP)) is not None


@pytest.mark.parametrize("place", ["targets", "ignore"])
def test_hostile_patterns(place: str, tmp_path: Path) -> None:
    """A folder ends with an error within seconds, and not in an hour."""
    hostile = r"re:((\w|\w\w|[.])+)+[A-Z]"
    found = content(group(targets=["Linear", hostile])) if place == "targets" else content(ignore=[hostile])
    refused(found.write(tmp_path), CheckpointError, repr(hostile), f"{PLACE}.", "write it more simply")


# --- values -----------------------------------------------------------------------------------------------------------


def declared(found: Content, folder: Path, layer: tuple[str, ...], suffix: str) -> tuple[Param, ...]:
    """What a scheme declares of one of its tensors, for each member of a layer."""
    read = CompressedTensorsFormat.load(CheckpointFolder(found.write(folder)))
    scheme = read.create_scheme_for_layer(LayerQuery("layer", modules=layer))
    assert isinstance(scheme, AscendLinearScheme)
    return linear_params(scheme)[suffix]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(
    ("weights", "inputs", "suffix"),
    [
        (INT8, INT8_TOKEN, "weight_scale"),
        (grouped(INT4), None, "weight_scale"),
        (INT8, INT8_STATIC, "input_scale"),
    ],
)
def test_values_that_cannot_be(
    value: float, weights: Arguments, inputs: Arguments | None, suffix: str, tmp_path: Path
) -> None:
    (param,) = declared(content(group(weights, inputs)), tmp_path, (UP,), suffix)
    sound = torch.ones(param.shape, dtype=param.dtype)
    check_values("layer", [f"{UP}.{suffix}"], param, sound)
    sound.view(-1)[-1] = value
    with pytest.raises(LoadError, match=f"{suffix} cannot be used") as raised:
        check_values("layer", [f"{UP}.{suffix}"], param, sound)
    assert f"{UP}.{suffix}" in str(raised.value)


@pytest.mark.parametrize(("weights", "wrong"), [(INT4, 8), (INT4, -9)])
def test_codes_of_more_bits_than_stated(weights: Arguments, wrong: int, tmp_path: Path) -> None:
    """Four bits in bytes: the rest of the byte must say the same."""
    (param,) = declared(content(group(weights, INT8_TOKEN)), tmp_path, (UP,), "weight")
    codes = torch.zeros(param.shape, dtype=param.dtype)
    check_values("layer", [f"{UP}.weight"], param, codes)
    codes[3, 4] = wrong
    with pytest.raises(LoadError, match="weight cannot be used"):
        check_values("layer", [f"{UP}.weight"], param, codes)


def test_zero_points_of_a_symmetric_weight_must_be_zero(tmp_path: Path) -> None:
    """Some writers store them all the same."""
    found = content()
    for module in {name.rpartition(".")[0] for name in found.tensors if name.endswith("weight_scale")}:
        rows = found.tensors[f"{module}.weight"].shape[0]
        found.tensors[f"{module}.weight_zero_point"] = torch.zeros(rows, 1, dtype=torch.int8)
    (param,) = declared(found, tmp_path, (UP,), "weight_offset")
    with pytest.raises(LoadError, match="weight_zero_point cannot be used"):
        check_values("layer", [f"{UP}.weight_zero_point"], param, torch.ones(param.shape, dtype=param.dtype))


# --- random damage ----------------------------------------------------------------------------------------------------


def outcome(folder: Path, module: str, *fused: str) -> str:
    """What becomes of a folder; whatever is raised must be ours, say where, and be no fault of the format."""
    message, kind = "", "served"
    try:
        read = CompressedTensorsFormat.load(CheckpointFolder(folder))
        list(CompressedTensorsFormat.findings(CheckpointFolder(folder)))
        for name in read.modules:
            read.layer_quant(LayerQuery(name))
        read.create_scheme_for_layer(LayerQuery(module))
        if fused:
            read.create_scheme_for_layer(LayerQuery("fused", modules=fused))
    except QuantError as error:
        message, kind = str(error), type(error).__name__
    assert kind != "RegistrationError", message
    named = "config.json", "model.safetensors", str(folder), "model."
    assert kind == "served" or any(name in message for name in named), message
    return kind


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 3, 4, 6, 8, 16, 32, 128, 10**30, 8.5, float("nan"), "", "null", "true", "8"),
        *([], {}, [None], [[]], [128, 128], [0, 0], [-1, 128], [True, 1], ["Linear"], ["re:("], ["re:.*"], {"a": {}}),
        *("int", "float", "INT", "channel", "tensor", "group", "block", "token", "tensor_group", "attn_head", "local"),
        *(
            "Linear",
            "re:.*",
            "torch.uint8",
            "torch.float8_e4m3fn",
            "torch.nonsense",
            "pack-quantized",
            "dense",
            "\ud800",
        ),
        *("int-quantized", "compressed-tensors", "99.0", INT8, INT8_TOKEN, {"group_0": group()}),
    ]
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with one of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def damage(config: dict[str, Any], data: st.DataObject) -> None:
    """Drop, rename, retype, double or move one value, mostly a deep one."""
    at = places(config["quantization_config"])
    if not at:
        return
    deep = [place for value in at if isinstance(value[0][value[1]], dict) for place in places(value[0][value[1]])]
    if deep and data.draw(st.integers(0, 4)):
        at = deep
    inside, key = data.draw(st.sampled_from(at))
    how = data.draw(st.sampled_from(["drop", "rename", "retype", "swap", "add"]))
    if how == "drop":
        del inside[key]
    elif how == "rename" and isinstance(inside, dict):
        other = data.draw(st.sampled_from(["num_bits", "weights", "ignore", f"{key}s", key[:-1], "x", "", "targets"]))
        inside[other] = inside.pop(key)
    elif how == "swap":
        other_inside, other_key = data.draw(st.sampled_from(at))
        inside[key] = deepcopy(other_inside[other_key])
    elif how == "add" and isinstance(inside, dict):
        inside[data.draw(st.sampled_from(["group_size", "actorder", "block_structure", "zp_dtype", "other"]))] = (
            deepcopy(data.draw(VALUES))
        )
    else:
        inside[key] = deepcopy(data.draw(VALUES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Overwritten at each example."""
    return tmp_path_factory.mktemp("damaged")


#: Weights and inputs of a folder whose section is damaged, or whose headers.
FORMS = [
    (INT8, INT8_TOKEN),
    (INT8, asymmetric(INT8_STATIC)),
    (asymmetric(grouped(INT4)), None),
    (FP8_BLOCK, FP8_GROUP_128),
    (MXFP8, at_run_time(MXFP8)),
    (MXFP4, None),
    (NVFP4, at_run_time(NVFP4)),
]


@given(st.data(), st.sampled_from(FORMS), st.integers(1, 4))
def test_random_damage_of_the_section(
    folder: Path, data: st.DataObject, form: tuple[Arguments, Arguments | None], times: int
) -> None:
    found = content(group(*form), layers=1)
    for _ in range(times):
        damage(found.config, data)
    if data.draw(st.booleans()):
        found.config["quantization_config"]["quant_method"] = "compressed-tensors"
    event(outcome(found.write(folder), UP, *QKV))


def test_there_are_real_configurations() -> None:
    assert len(CONFIGS) >= 1


@given(st.data(), st.sampled_from(CONFIGS), st.integers(1, 4))
def test_random_damage_of_real_configurations(folder: Path, data: st.DataObject, config: Path, times: int) -> None:
    """Beside weights that may be of another form: what they say together is never a surprise."""
    real = json.loads(config.read_text())
    for _ in range(times):
        damage(real, data)
    weights, inputs = data.draw(st.sampled_from(FORMS))
    found = content(group(weights, inputs), layers=1)
    found.config = real
    event(outcome(found.write(folder), UP, *QKV))


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 31, 32, 64, 127, 128, 256, 2**31]), max_size=3).map(tuple)
SUFFIXES = [
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "bias"),
    *("input_scale", "input_zero_point", "weight_global_scale", "input_global_scale", "k_scale", "strange", ""),
]


@given(st.data(), st.sampled_from(FORMS))
def test_random_headers(folder: Path, data: st.DataObject, form: tuple[Arguments, Arguments | None]) -> None:
    """Up to four changes of what the modules of one fused layer store."""
    headers = {
        f"{module}.{suffix}": (tensor.dtype, tuple(tensor.shape))
        for module in QKV
        for suffix, tensor in stored(*form, SIZES["self_attn.k_proj"]).items()
    }
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(headers)))
        dtype, shape = headers[name]
        how = data.draw(st.sampled_from(["drop", "retype", "reshape", "resize", "add"]))
        if how == "drop" and len(headers) > 1:
            del headers[name]
        elif how == "retype":
            headers[name] = data.draw(st.sampled_from(DTYPES)), shape
        elif how == "reshape":
            headers[name] = dtype, data.draw(SHAPES)
        elif how == "resize" and shape:
            at, factor = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.sampled_from([0.5, 2, 4]))
            headers[name] = dtype, (*shape[:at], int(shape[at] * factor), *shape[at + 1 :])
        else:
            module, suffix = data.draw(st.sampled_from(QKV)), data.draw(st.sampled_from(SUFFIXES))
            headers[f"{module}.{suffix}"] = data.draw(st.sampled_from(DTYPES)), data.draw(SHAPES)
    assume(all(math.prod(shape) < 2**38 for _, shape in headers.values()))
    (folder / "config.json").write_text(json.dumps({PLACE: section(group(*form))}))
    values = {name: SIZES["self_attn.k_proj"] for name, header in headers.items() if header == (torch.int64, (2,))}
    write_headers(folder / "model.safetensors", headers, values)
    event(outcome(folder, QKV[0], *QKV))


@pytest.mark.parametrize("form", FORMS)
def test_sound_folders_are_served(form: tuple[Arguments, Arguments | None], folder: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    assert outcome(content(group(*form), layers=1).write(folder), UP, *QKV) == "served"


@pytest.mark.parametrize("structure", [[0, 0], [0, 128], [-1, 128], [1, 1], [True, True], [10**12, 10**12]])
def test_blocks_of_any_size(structure: list[int], folder: Path) -> None:
    found = content(group({**FP8_BLOCK, "block_structure": structure}, None), layers=0)
    found.put(UP, {"weight": torch.zeros(256, 128, dtype=torch.float8_e4m3fn), "weight_scale": torch.ones(2, 1)})
    assert outcome(found.write(folder), UP) != "served"


@pytest.mark.parametrize("args", [arguments(10**30), arguments(-8), arguments(0), grouped(INT4, 2**40)])
def test_numbers_of_any_size(args: Arguments, folder: Path) -> None:
    found = content(group(INT8, None), layers=1)
    found.group()["weights"] = args
    assert outcome(found.write(folder), UP) in ("UnsupportedSchemeError", "CheckpointError", "LoadError")
