"""From a folder and an engine's layer to a scheme, without an engine."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_folders import (
    EXPERTS,
    FP8,
    FP8_STATIC,
    FP8_TOKEN,
    HEADS,
    HIDDEN,
    INT4,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    VOCABULARY,
    WIDE,
    Content,
    asymmetric,
    content,
    group,
    grouped,
    section,
    stored,
    with_experts,
)

from quant_compressed_tensors import CompressedTensorsFormat
from quant_compressed_tensors.section import Section
from quant_core import (
    DOWN,
    GATE_UP,
    CheckpointError,
    CheckpointFolder,
    ExpertSizes,
    LayerQuery,
    LayerResolutionError,
    LinearSizes,
    LoadError,
    QuantError,
    UnknownLayerError,
    detect_formats,
    get_scheme_class,
    list_formats,
)
from quant_core.checkpoint import PlannedFolder

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = tuple(f"{ATTENTION}.{part}_proj" for part in "qkv")
GATE_AND_UP = (f"{MLP}.gate_proj", f"{MLP}.up_proj")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def load(found: Content, folder: Path) -> CompressedTensorsFormat:
    return CompressedTensorsFormat.load(CheckpointFolder(found.write(folder)))


# --- detection --------------------------------------------------------------------------------------------------------


def test_announced_and_detected(tmp_path: Path) -> None:
    assert list_formats()["compressed-tensors"] is CompressedTensorsFormat
    (detection,) = detect_formats(CheckpointFolder(content().write(tmp_path)))
    assert detection.format == "compressed-tensors"
    assert "has quantization_config in config.json" in detection.reason
    (tmp_path / "config.json").write_text('{"compression_config": {"transform_config": {}}}')
    assert detect_formats(CheckpointFolder(tmp_path)) == []
    (tmp_path / "config.json").unlink()
    assert detect_formats(CheckpointFolder(tmp_path)) == []


def test_looking_at_folders_does_not_import_the_library(tmp_path: Path) -> None:
    """It imports transformers, which takes seconds: nobody who has other checkpoints pays for it."""
    content().write(tmp_path)
    code = f"""
import sys
from quant_core import CheckpointFolder
from quant_compressed_tensors import CompressedTensorsFormat
assert CompressedTensorsFormat.detect(CheckpointFolder({str(tmp_path)!r})) is not None
print([name for name in ("compressed_tensors", "transformers", "vllm", "torch_npu") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_works_without_an_engine(tmp_path: Path) -> None:
    """The whole way from the folder to a scheme imports neither vLLM nor torch_npu."""
    content().write(tmp_path)
    code = f"""
import sys
from quant_core import CheckpointFolder, LayerQuery
from quant_compressed_tensors import CompressedTensorsFormat
read = CompressedTensorsFormat.load(CheckpointFolder({str(tmp_path)!r}))
assert read.create_scheme_for_layer(LayerQuery("{ATTENTION}.o_proj")) is not None
print([name for name in ("vllm", "torch_npu", "vllm_ascend_quant", "quant_modelslim") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules", "quant_type", "sizes"),
    [
        ("model.layers.0.self_attn.qkv_proj", QKV, "W8A8_DYNAMIC", [HIDDEN, HEADS, HEADS]),
        ("model.layers.0.self_attn.o_proj", (f"{ATTENTION}.o_proj",), "W8A8_DYNAMIC", [HIDDEN]),
        ("model.layers.0.mlp.gate_up_proj", GATE_AND_UP, "W4A16", [WIDE, WIDE]),
        ("model.layers.0.mlp.down_proj", (f"{MLP}.down_proj",), None, []),
        ("lm_head", ("lm_head",), None, []),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_schemes_for_fused_and_single_layers(
    name: str, modules: tuple[str, ...], quant_type: str | None, sizes: list[int], named: bool, tmp_path: Path
) -> None:
    """Whether the engine names the modules, or says how it fuses."""
    found = content(group(), group(grouped(INT4), None, ["re:.*mlp"]))
    for module in GATE_AND_UP:
        found.put(module, stored(grouped(INT4), None, (WIDE, HIDDEN)))
    found.put_float(f"{MLP}.down_proj")
    query = LayerQuery(name, modules=modules if named else (), packed_modules={} if named else PACKED)
    read = load(found, tmp_path)
    quant = read.layer_quant(query)
    assert (quant.quant_type, quant.modules) == (quant_type, modules)
    assert len(quant.evidence) == len(modules)
    scheme = read.create_scheme_for_layer(query)
    if quant_type is None:
        assert scheme is None
        assert quant.reason
        return
    assert type(scheme) is get_scheme_class(quant_type, "linear")
    assert [shard.output_size for shard in scheme.context.shards] == sizes
    assert [form.module for form in scheme.context.stored] == list(modules)


def test_evidence(tmp_path: Path) -> None:
    """Every decision can be explained by an entry of config.json."""
    found = content(ignore=["lm_head", "re:.*down_proj$"])
    found.put_float(f"{MLP}.down_proj")
    found.put_float("model.layers.1.mlp.down_proj")
    found.put_float(f"{MLP}.up_proj")
    read = load(found, tmp_path)
    said = {
        name: str(read.layer_quant(LayerQuery(name)).evidence[0])
        for name in (f"{ATTENTION}.q_proj", f"{MLP}.down_proj", f"{MLP}.up_proj", "lm_head")
    }
    assert said == {
        f"{ATTENTION}.q_proj": "config.json: quantization_config.config_groups.group_0 = Linear",
        f"{MLP}.down_proj": "config.json: quantization_config.ignore = re:.*down_proj$",
        f"{MLP}.up_proj": "config.json: quantization_config.config_groups.group_0 = Linear",
        "lm_head": "config.json: quantization_config.ignore = lm_head",
    }


@pytest.mark.parametrize("change", ["ignored", "float", "another type"])
def test_members_of_which_one_is_otherwise(change: str, tmp_path: Path) -> None:
    found = content(group(), group(INT8, None, ["re:.*k_proj"]))
    for layer in range(2):
        found.put(f"model.layers.{layer}.self_attn.k_proj", stored(INT8, None, (HEADS, HIDDEN)))
    if change != "another type":
        found.put_float(QKV[1])
    if change == "ignored":
        found.section["ignore"].append(QKV[1])
    with pytest.raises(LayerResolutionError) as raised:
        load(found, tmp_path).layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", modules=QKV))
    message = str(raised.value)
    reasons = {
        "ignored": f"{QKV[1]} is float (ignored by '{QKV[1]}')",
        "float": f"{QKV[1]} is float (its weight is float, though 're:.*k_proj' matches)",
        "another type": f"{QKV[1]} is W8A16 (group_1, by 're:.*k_proj')",
    }
    for said in (
        f"{ATTENTION}.qkv_proj: the members of this layer are quantised differently",
        f"{QKV[0]} is W8A8_DYNAMIC (group_0, by 'Linear')",
        reasons[change],
        "expected: one type for all of them",
        "what to do: quantise the members alike, or name all of them in `ignore`",
    ):
        assert said in message


def test_members_that_are_all_ignored(tmp_path: Path) -> None:
    found = content(ignore=["re:.*0.self_attn.[qkv]_proj"])
    for module in QKV:
        found.put_float(module)
    quant = load(found, tmp_path).layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", modules=QKV))
    assert (quant.quant_type, quant.modules, len(quant.evidence)) == (None, QKV, 3)


def test_members_of_one_type_and_two_forms(tmp_path: Path) -> None:
    """Groups of 32 and of 64 are one type, and cannot be multiplied at once."""
    found = content(group(grouped(INT4), None), group(grouped(INT4, 64), None, ["re:.*k_proj"]))
    for layer in range(2):
        found.put(f"model.layers.{layer}.self_attn.k_proj", stored(grouped(INT4, 64), None, (HEADS, HIDDEN)))
    read = load(found, tmp_path)
    assert read.layer_quant(LayerQuery("qkv", modules=QKV)).quant_type == "W4A16"
    with pytest.raises(LoadError, match=r"k_proj\.weight_scale in model\.safetensors is bfloat16 \[64, 2\], expected"):
        read.create_scheme_for_layer(LayerQuery("qkv", modules=QKV))


@pytest.mark.parametrize("named", [True, False])
def test_a_member_that_is_absent(named: bool, tmp_path: Path) -> None:
    found = content()
    found.drop(QKV[2])
    query = LayerQuery(f"{ATTENTION}.qkv_proj", modules=QKV if named else (), packed_modules={} if named else PACKED)
    with pytest.raises(LayerResolutionError) as raised:
        load(found, tmp_path).layer_quant(query)
    assert f"{ATTENTION}.qkv_proj: " in str(raised.value)
    assert QKV[2] in str(raised.value)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
def test_a_tensor_that_one_member_lacks(suffix: str, tmp_path: Path) -> None:
    found = content()
    del found.tensors[f"{QKV[1]}.{suffix}"]
    with pytest.raises(LoadError, match=f"{QKV[1]}"):
        load(found, tmp_path)


def test_a_layer_that_nobody_knows(tmp_path: Path) -> None:
    read = load(content(), tmp_path)
    with pytest.raises(UnknownLayerError) as raised:
        read.layer_quant(LayerQuery("model.layers.9.mlp.down_proj"))
    message = str(raised.value)
    assert message.startswith("model.layers.9.mlp.down_proj: the weight files do not know this layer")
    for said in (f"where: {tmp_path}", "expected: tensors of model.layers.9.mlp.down_proj", "what to do: "):
        assert said in message


def test_sizes_of_the_engine_must_be_those_of_the_files(tmp_path: Path) -> None:
    query = LayerQuery(f"{ATTENTION}.o_proj", sizes=LinearSizes(64, (HIDDEN,)))
    with pytest.raises(LoadError, match=r"o_proj\.weight in model\.safetensors is int8 \[128, 128\], expected .*64"):
        load(content(), tmp_path).create_scheme_for_layer(query)


def test_a_scale_that_is_a_scalar(tmp_path: Path) -> None:
    """Old files and converters have scales without an axis."""
    tensor, static = {**INT8, "strategy": "tensor"}, {**INT8_STATIC}
    found = content(group(tensor, static))
    for name in list(found.tensors):
        if name.endswith("_scale"):
            found.tensors[name] = found.tensors[name].reshape(())
    scheme = load(found, tmp_path).create_scheme_for_layer(LayerQuery("qkv", modules=QKV))
    assert type(scheme) is get_scheme_class("W8A8", "linear")


def test_a_head_and_embeddings_in_groups_of_their_own(tmp_path: Path) -> None:
    found = content(group(), group(INT8, None, ["Embedding", "lm_head"]), ignore=[])
    for name in ("lm_head", "model.embed_tokens"):
        found.put(name, stored(INT8, None, (VOCABULARY, HIDDEN)))
    read = load(found, tmp_path)
    for name, layer_class in [("lm_head", "lm_head"), ("model.embed_tokens", "Embedding")]:
        assert read.layer_quant(LayerQuery(name, layer_class=layer_class)).quant_type == "W8A16"


def test_a_tied_head(tmp_path: Path) -> None:
    """One table in the file serves both: the engine asks for the head with the module of the embeddings."""
    found = content(group(), group(INT8, None, ["Embedding", "lm_head"]), ignore=[])
    found.config["tie_word_embeddings"] = True
    found.drop("lm_head")
    found.put("model.embed_tokens", stored(INT8, None, (VOCABULARY, HIDDEN)))
    read = load(found, tmp_path)
    query = LayerQuery("lm_head", modules=("model.embed_tokens",), layer_class="lm_head")
    assert read.layer_quant(query).quant_type == "W8A16"
    assert [finding for finding in read.review({}) if "lm_head" in finding.what] == []


# --- names ------------------------------------------------------------------------------------------------------------


def test_canonical_names(tmp_path: Path) -> None:
    found = content(group(asymmetric(grouped(INT4)), None))
    read = load(found, tmp_path)
    names = {suffix: read.canonical_name(f"{QKV[0]}.{suffix}") for suffix in ("weight_packed", "weight_scale")}
    assert names == {"weight_packed": f"{QKV[0]}.weight", "weight_scale": f"{QKV[0]}.weight_scale"}
    assert read.canonical_name(f"{QKV[0]}.weight_zero_point") == f"{QKV[0]}.weight_offset"
    assert read.canonical_name(f"{QKV[0]}.weight_shape") is None
    assert read.canonical_name("lm_head.weight") == "lm_head.weight"
    assert set(read.modules[QKV[0]].tensors) == {"weight", "weight_scale", "weight_offset"}


def test_names_of_static_inputs(tmp_path: Path) -> None:
    read = load(content(group(INT8, asymmetric(INT8_STATIC))), tmp_path)
    assert read.canonical_name(f"{QKV[0]}.input_zero_point") == f"{QKV[0]}.input_offset"
    assert set(read.modules[QKV[0]].tensors) == {"weight", "weight_scale", "input_scale", "input_offset"}


def test_one_thing_under_two_names(tmp_path: Path) -> None:
    found = content(group(grouped(INT4), None))
    found.tensors[f"{QKV[0]}.weight"] = torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=f"{QKV[0]} stores the same twice") as raised:
        load(found, tmp_path)
    assert "weight_packed" in str(raised.value)


# --- experts ----------------------------------------------------------------------------------------------------------


def experts(prefix: str = "model.layers.1.mlp.experts") -> Mapping[str, tuple[tuple[str, ...], ...]]:
    members = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
    return {h: tuple(tuple(f"{prefix}.{e}.{m}" for m in own) for e in range(EXPERTS)) for h, own in members.items()}


def asked(**more: Any) -> LayerQuery:
    sizes = ExpertSizes(HIDDEN, HEADS, EXPERTS)
    return LayerQuery("model.layers.1.mlp.experts", "moe", experts=experts(), sizes=sizes, **more)


@pytest.mark.parametrize(
    ("weights", "inputs", "quant_type"),
    [
        (INT8, INT8_TOKEN, "W8A8_DYNAMIC"),
        (grouped(INT4), None, "W4A16"),
        (INT4, INT8_TOKEN, "W4A8_DYNAMIC"),
        (FP8, FP8_TOKEN, "WFP8AFP8_DYNAMIC"),
        (INT8, INT8_STATIC, "W8A8"),
        (FP8, FP8_STATIC, "WFP8AFP8"),
    ],
)
def test_experts(weights: Any, inputs: Any, quant_type: str, tmp_path: Path) -> None:
    found = with_experts(content(group(weights, inputs)), weights, inputs)
    read = load(found, tmp_path)
    quant = read.experts_quant(asked())
    assert quant.quant_type == quant_type
    assert [half.quant_type for half in quant.halves.values()] == [quant_type] * 2
    assert len(quant.modules) == 3 * EXPERTS
    assert type(read.create_scheme_for_layer(asked())) is get_scheme_class(quant_type, "moe")
    assert read.layer_quant(LayerQuery("model.layers.1.mlp.gate")).quant_type is None  # a router that no list names


def test_experts_of_two_types(tmp_path: Path) -> None:
    groups = group(), group(INT4, targets=["re:.*experts.*down_proj"])
    read = load(with_experts(content(*groups)), tmp_path)
    assert read.experts_quant(asked()).quant_type == "W8A8_DYNAMIC and W4A8_DYNAMIC"
    assert read.create_scheme_for_layer(asked()) is not None


def test_experts_under_the_name_of_their_class(tmp_path: Path) -> None:
    read = load(with_experts(content(group(), group(INT4, targets=["MoEGMM"]))), tmp_path)
    assert read.experts_quant(asked()).quant_type == "W4A8_DYNAMIC"
    assert list(read.review({})) == []


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_an_expert_that_is_otherwise(expert: int, tmp_path: Path) -> None:
    """Whichever it is: others look at the first only."""
    found = with_experts(content())
    odd = f"model.layers.1.mlp.experts.{expert}.up_proj"
    found.put_float(odd, (HEADS, HIDDEN))
    with pytest.raises(LayerResolutionError, match=f"{odd} is float"):
        load(found, tmp_path).experts_quant(asked())


def test_an_expert_that_is_absent(tmp_path: Path) -> None:
    found = with_experts(content())
    found.drop("model.layers.1.mlp.experts.1.down_proj")
    with pytest.raises(UnknownLayerError, match=r"experts\.1\.down_proj"):
        load(found, tmp_path).experts_quant(asked())


def test_experts_of_which_one_half_is_float(tmp_path: Path) -> None:
    found = with_experts(content(ignore=["lm_head", "re:.*experts.*down_proj"]))
    for expert in range(EXPERTS):
        found.put_float(f"model.layers.1.mlp.experts.{expert}.down_proj", (HIDDEN, HEADS))
    with pytest.raises(LayerResolutionError, match="one half of these experts is quantised"):
        load(found, tmp_path).experts_quant(asked())


# --- reading ----------------------------------------------------------------------------------------------------------


def test_findings_are_what_load_raises(tmp_path: Path) -> None:
    """All at once, with their fields, and without raising."""
    found = content()
    found.section["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    found.tensors[f"{QKV[0]}.weight_scale"] = torch.ones(7, 1)
    found.put_float("stray", (4, 4))
    found.tensors["stray.weight_scale"] = torch.ones(1)
    found.section["ignore"].append("model.layers.77.mlp.gate")
    folder = CheckpointFolder(found.write(tmp_path))
    findings = list(CompressedTensorsFormat.findings(folder))
    errors = [finding for finding in findings if finding.severity == "error"]
    with pytest.raises(QuantError) as raised:
        CompressedTensorsFormat.load(folder)
    assert list(raised.value.findings) == errors
    for said in ("kv_cache_scheme", f"{QKV[0]}.weight_scale", "stray is stored in float"):
        assert any(said in str(finding) for finding in errors), said
        assert said in str(raised.value)
    assert [finding.what for finding in findings if finding.severity == "warning"] == [
        "'model.layers.77.mlp.gate' names no module of this checkpoint"
    ]


def test_findings_of_what_cannot_be_read(tmp_path: Path) -> None:
    found = content()
    found.section["config_groups"] = 7
    (finding,) = CompressedTensorsFormat.findings(CheckpointFolder(found.write(tmp_path)))
    assert (finding.error, finding.file) == (CheckpointError, "config.json")


def test_a_sound_folder_has_no_findings(tmp_path: Path) -> None:
    assert list(CompressedTensorsFormat.findings(CheckpointFolder(content().write(tmp_path)))) == []


def test_a_section_in_another_place(tmp_path: Path) -> None:
    """Messages and evidence name it."""
    found = content(ignore=["lm_head", "re:.*nothing"])
    found.config["text_config"] = {"compression_config": found.config.pop("quantization_config")}
    read = CompressedTensorsFormat.load(CheckpointFolder(found.write(tmp_path)))
    quant = read.layer_quant(LayerQuery(f"{ATTENTION}.o_proj"))
    assert quant.evidence[0].key == "text_config.compression_config.config_groups.group_0"
    (finding,) = read.review({})
    assert finding.where == "config.json: text_config.compression_config.ignore"


def test_while_there_are_no_files(tmp_path: Path) -> None:
    """What will be served follows from the section alone, with the sizes of the engine."""
    (tmp_path / "config.json").write_text("{}")
    folder = PlannedFolder(tmp_path)
    folder.__dict__["config"] = {"quantization_config": section(group(grouped(INT4), None), format="pack-quantized")}
    planned = CompressedTensorsFormat(folder, Section.read(folder))
    query = LayerQuery("qkv", modules=QKV, sizes=LinearSizes(HIDDEN, (HIDDEN, HEADS, HEADS)))
    scheme = planned.create_scheme_for_layer(query)
    assert type(scheme) is get_scheme_class("W4A16", "linear")
    assert scheme.params(HIDDEN, HIDDEN)["weight"].shape == (HIDDEN, HIDDEN // 8)
    assert planned.create_scheme_for_layer(LayerQuery("lm_head", modules=("lm_head",))) is None


# --- the time that resolution takes -----------------------------------------------------------------------------------


def test_a_module_costs_the_same_in_a_model_of_any_size(tmp_path: Path) -> None:
    """Nothing is judged twice: thousands of experts are one kind."""
    judged = []
    for layers in (2, 12):
        found = content(layers=layers)
        read = load(found, tmp_path / str(layers))
        for name in read.modules:
            read.layer_quant(LayerQuery(name))
        judged.append(len(read.resolver._alike))
    assert judged[0] == judged[1] == 4  # the four sizes of its linear layers
