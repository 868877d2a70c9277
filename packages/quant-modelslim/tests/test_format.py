"""Resolution: from an engine's layer to type, evidence and scheme, without an engine."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import (
    CheckpointFolder,
    LayerQuery,
    LayerResolutionError,
    LinearSizes,
    LoadError,
    StoredTensor,
    UnknownLayerError,
    detect_formats,
    get_scheme_class,
    list_formats,
)
from quant_modelslim import Description, ModelSlimFormat
from quant_modelslim.validate import examine

ATTENTION = "model.layers.0.self_attn"


def load(folder: Path) -> ModelSlimFormat:
    return ModelSlimFormat.load(CheckpointFolder(folder))


def test_announced_and_detected(tmp_path: Path, small: Any) -> None:
    assert list_formats()["modelslim"] is ModelSlimFormat
    folder = CheckpointFolder(small.write(tmp_path / "a"))
    (detection,) = detect_formats(folder)
    assert detection.format == "modelslim"
    assert "quant_model_description.json" in detection.reason
    legacy = CheckpointFolder(small.write(tmp_path / "b", description="quant_model_description_w8a8.json"))
    assert "quant_model_description_w8a8.json" in detect_formats(legacy)[0].reason
    (tmp_path / "a" / "quant_model_description.json").unlink()
    assert "quant_model_weights.safetensors" in detect_formats(folder)[0].reason  # to say what is missing
    (tmp_path / "a" / "quant_model_weights.safetensors").rename(tmp_path / "a" / "model.safetensors")
    assert detect_formats(folder) == []


@pytest.mark.parametrize(
    ("keys", "sign"),
    [
        ({}, None),
        ({"metadata": {}, "optional": {}, "is_rot_used": False}, None),
        (
            {"optional": {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}},
            "optional.quarot",
        ),
        ({"metadata": {"quarot": {"max_tp_size": 1, "heads_rotation": {"layers": []}}}}, "metadata.quarot"),
        ({"is_rot_used": True}, "is_rot_used"),
    ],
)
def test_a_rotation_that_is_folded_into_the_weights(keys: dict[str, Any], sign: str | None, tmp_path: Path) -> None:
    description = Description.parse({"model.layers.0.mlp.up_proj.weight": "FLOAT", **keys}, "description.json")
    found = ModelSlimFormat(CheckpointFolder(tmp_path), description).rotation
    assert found == (None if sign is None else f"description.json has {sign}")


def test_works_without_an_engine(tmp_path: Path, small: Any) -> None:
    """The whole way from the folder to a scheme imports neither vLLM nor torch_npu nor transformers."""
    small.write(tmp_path)
    code = f"""
import sys
from quant_core import CheckpointFolder, LayerQuery
from quant_modelslim import ModelSlimFormat
read = ModelSlimFormat.load(CheckpointFolder({str(tmp_path)!r}))
assert read.create_scheme_for_layer(LayerQuery("model.layers.1.self_attn.o_proj")) is not None
print([name for name in ("vllm", "torch_npu", "transformers", "vllm_ascend_quant") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize(
    ("name", "quant_type", "sizes"),
    [
        (f"{ATTENTION}.qkv_proj", "W8A8_DYNAMIC", [32, 16, 16]),
        (f"{ATTENTION}.o_proj", "W8A8_DYNAMIC", [32]),
        (f"{ATTENTION}.k_proj", "W8A8_DYNAMIC", [16]),
        ("model.layers.0.mlp.gate_up_proj", "W8A16", [64, 64]),
        ("model.layers.1.self_attn.qkv_proj", "W8A8", [32, 16, 16]),
        ("model.layers.1.mlp.gate_up_proj", None, []),
        ("model.layers.1.mlp.down_proj", None, []),
    ],
)
def test_schemes_for_fused_and_single_layers(
    tmp_path: Path,
    small: Any,
    packed_modules: dict[str, list[str]],
    name: str,
    quant_type: str | None,
    sizes: list[int],
) -> None:
    """Sizes come from the files when no engine gives them."""
    scheme = load(small.write(tmp_path)).create_scheme_for_layer(LayerQuery(name, packed_modules=packed_modules))
    if quant_type is None:
        assert scheme is None
        return
    assert type(scheme) is get_scheme_class(quant_type, "linear")
    assert [shard.output_size for shard in scheme.context.shards] == sizes
    assert [form.has("weight") for form in scheme.context.stored] == [True] * len(sizes)


def test_the_engine_may_name_the_modules(tmp_path: Path, small: Any) -> None:
    """However it calls the layer itself."""
    modules = tuple(f"{ATTENTION}.{part}_proj" for part in "qkv")
    scheme = load(small.write(tmp_path)).create_scheme_for_layer(
        LayerQuery("language_model.0.attn.qkv", modules=modules)
    )
    assert scheme is not None
    assert [shard.name for shard in scheme.context.shards] == list(modules)


def test_fused_on_disk(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """A module that is stored fused is found under its own name first, and cut into the engine's members."""
    for suffix in ("weight", "weight_scale", "weight_offset"):
        parts = [small.tensors.pop(f"model.layers.0.mlp.{part}_proj.{suffix}") for part in ("gate", "up")]
        small.tensors[f"model.layers.0.mlp.gate_up_proj.{suffix}"] = torch.cat(parts)
        for part in ("gate", "up"):
            del small.description[f"model.layers.0.mlp.{part}_proj.{suffix}"]
        small.description[f"model.layers.0.mlp.gate_up_proj.{suffix}"] = "W8A16"
    query = LayerQuery(
        "model.layers.0.mlp.gate_up_proj", packed_modules=packed_modules, sizes=LinearSizes(32, (64, 64))
    )
    scheme = load(small.write(tmp_path)).create_scheme_for_layer(query)
    assert scheme is not None
    assert [shard.name for shard in scheme.context.shards] == ["model.layers.0.mlp.gate_up_proj"] * 2


def test_evidence(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """Every decision can be explained."""
    read = load(small.write(tmp_path))
    quant = read.layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", packed_modules=packed_modules))
    assert [str(evidence) for evidence in quant.evidence] == [
        f"quant_model_description.json: {ATTENTION}.{part}_proj.weight = W8A8_DYNAMIC" for part in "qkv"
    ]
    quant = read.layer_quant(LayerQuery("model.layers.1.mlp.down_proj"))
    assert quant.quant_type is None
    assert quant.reason == "quant_model_description.json: model.layers.1.mlp.down_proj.weight = FLOAT"


def test_float_for_lack_of_a_key(tmp_path: Path, small: Any) -> None:
    """Writers leave out what they did not look at; a float weight in the files is evidence enough."""
    del small.description["model.layers.1.mlp.down_proj.weight"]
    quant = load(small.write(tmp_path)).layer_quant(LayerQuery("model.layers.1.mlp.down_proj"))
    assert quant.quant_type is None
    assert quant.reason == (
        "quant_model_weights.safetensors: model.layers.1.mlp.down_proj.weight = "
        "float32, no key in quant_model_description.json"
    )


def test_described_but_not_in_the_files(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """A FLOAT key without a tensor decides; whether the model needs the tensor is for the loader to see."""
    for part in ("gate", "up", "down"):
        del small.tensors[f"model.layers.1.mlp.{part}_proj.weight"]
    read = load(small.write(tmp_path))
    for name in ("gate_up_proj", "down_proj"):
        assert (
            read.create_scheme_for_layer(LayerQuery(f"model.layers.1.mlp.{name}", packed_modules=packed_modules))
            is None
        )


def test_a_layer_that_nobody_knows(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    read = load(small.write(tmp_path))
    with pytest.raises(UnknownLayerError) as raised:
        read.layer_quant(LayerQuery("model.layers.0.self_attention.o_proj"))
    message = str(raised.value)
    assert message.startswith("model.layers.0.self_attention.o_proj: neither quant_model_description.json nor")
    assert "expected: the keys model.layers.0.self_attention.o_proj.weight" in message
    assert "the nearest keys are model.layers.0.self_attn.o_proj.weight" in message
    assert "another format" not in message
    with pytest.raises(UnknownLayerError) as raised:
        read.layer_quant(LayerQuery("model.layers.9.self_attn.qkv_proj", packed_modules=packed_modules))
    message = str(raised.value)
    assert message.startswith("model.layers.9.self_attn.qkv_proj: ")
    for part in "qkv":
        assert f"model.layers.9.self_attn.{part}_proj.weight" in message


def test_a_folder_that_looks_like_another_format(tmp_path: Path, small: Any) -> None:
    """A layer without a key may be one of a folder that was quantised by another tool."""
    small.write(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(UnknownLayerError, match=r"another format: .*declares the method 'compressed-tensors'"):
        load(tmp_path).layer_quant(LayerQuery("model.layers.0.linear"))


def test_members_that_disagree(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    for suffix in ("weight", "weight_scale", "weight_offset"):
        small.description[f"{ATTENTION}.k_proj.{suffix}"] = "W8A16"
    with pytest.raises(LayerResolutionError) as raised:
        load(small.write(tmp_path)).layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", packed_modules=packed_modules))
    for said in (f"{ATTENTION}.qkv_proj: ", "q_proj is W8A8_DYNAMIC", "k_proj is W8A16", "v_proj is W8A8_DYNAMIC"):
        assert said in str(raised.value)


def test_members_of_which_one_is_float(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    for suffix in ("weight", "weight_scale", "weight_offset"):
        small.drop(f"{ATTENTION}.v_proj.{suffix}")
    small.tensors[f"{ATTENTION}.v_proj.weight"] = torch.zeros(16, 32)
    small.description[f"{ATTENTION}.v_proj.weight"] = "FLOAT"
    with pytest.raises(LayerResolutionError, match="v_proj is FLOAT"):
        load(small.write(tmp_path)).layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", packed_modules=packed_modules))


def test_members_of_which_one_is_absent(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    for name in [name for name in small.tensors if ".0.self_attn.k_proj." in name]:
        small.drop(name)
    with pytest.raises(LayerResolutionError, match=f"only some members.*(?s:.)*also {ATTENTION}.k_proj"):
        load(small.write(tmp_path)).layer_quant(LayerQuery(f"{ATTENTION}.qkv_proj", packed_modules=packed_modules))


def test_members_of_other_forms(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """One granularity and dtype for what is multiplied at once."""
    for suffix in ("weight_scale", "weight_offset"):
        small.tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = torch.ones(64, 2)
    query = LayerQuery("model.layers.0.mlp.gate_up_proj", packed_modules=packed_modules)
    with pytest.raises(
        LoadError, match=r"up_proj\.weight_scale in quant_model_weights\.safetensors is float32 \[64, 2\]"
    ):
        load(small.write(tmp_path)).create_scheme_for_layer(query)


def test_sizes_of_the_engine_must_be_those_of_the_files(tmp_path: Path, small: Any) -> None:
    query = LayerQuery(f"{ATTENTION}.o_proj", sizes=LinearSizes(64, (32,)))
    with pytest.raises(LoadError) as raised:
        load(small.write(tmp_path)).create_scheme_for_layer(query)
    for said in ("o_proj.weight in quant_model_weights.safetensors is int8 [32, 32]", "expected int8 [32, 64]"):
        assert said in str(raised.value)


def test_a_type_of_another_layer_type(tmp_path: Path, small: Any) -> None:
    query = LayerQuery(f"{ATTENTION}.o_proj", layer_type="moe")
    with pytest.raises(LayerResolutionError, match="a question about experts names the modules of none"):
        load(small.write(tmp_path)).create_scheme_for_layer(query)


# --- the time that resolution takes -----------------------------------------------------------------------------------


class Counting(dict[str, Any]):
    """A mapping that counts what is done with it."""

    done: Counter[str]

    def __init__(self, content: Mapping[str, Any], done: Counter[str]) -> None:
        super().__init__(content)
        self.done = done

    def __getitem__(self, key: str) -> Any:
        self.done["look-ups"] += 1
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.done["look-ups"] += 1
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.done["look-ups"] += 1
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.done["scans"] += 1
        return super().__iter__()

    def items(self) -> Any:
        self.done["scans"] += 1
        return super().items()

    def keys(self) -> Any:
        self.done["scans"] += 1
        return super().keys()

    def values(self) -> Any:
        self.done["scans"] += 1
        return super().values()


def deepseek_like(tmp_path: Path, layers: int, experts: int) -> tuple[ModelSlimFormat, list[LayerQuery], Counter[str]]:
    """Description and headers of a model of many experts, without a file, and a question about each layer."""
    types, tensors, queries = {}, {}, []

    def add(module: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        types[f"{module}.{suffix}"] = "W8A8_DYNAMIC"
        tensors[f"{module}.{suffix}"] = StoredTensor(f"{module}.{suffix}", shape, dtype, "weights.safetensors")

    packed = {"gate_up_proj": ("gate_proj", "up_proj"), "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
    for i in range(layers):
        parts = [f"mlp.experts.{e}.{part}_proj" for e in range(experts) for part in ("gate", "up", "down")]
        for part in [*parts, "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]:
            module = f"model.layers.{i}.{part}"
            add(module, "weight", (2048, 7168), torch.int8)
            add(module, "weight_scale", (2048, 1), torch.float32)
            add(module, "weight_offset", (2048, 1), torch.float32)
        names = ["self_attn.fused_qkv_a_proj", "self_attn.o_proj"]
        names += [f"mlp.experts.{e}.{part}_proj" for e in range(experts) for part in ("gate_up", "down")]
        queries += [LayerQuery(f"model.layers.{i}.{name}", packed_modules=packed) for name in names]
    done: Counter[str] = Counter()
    folder = CheckpointFolder(tmp_path)
    folder.__dict__["tensors"] = Counting(tensors, done)
    return ModelSlimFormat(folder, Description("description.json", Counting(types, done))), queries, done


def test_a_layer_costs_the_number_of_its_members(tmp_path: Path) -> None:
    """Not a scan of the description: DeepSeek-V3 has 140,000 keys and as many layers as a third of them."""
    costs = []
    for layers, experts in ((2, 4), (61, 256)):
        read, queries, done = deepseek_like(tmp_path, layers, experts)
        read.layer_quant(queries[0])  # what is made once, is made now
        done.clear()
        for query in queries:
            assert read.layer_quant(query).quant_type == "W8A8_DYNAMIC"
        costs.append(done["look-ups"] / len(queries))
        for query in queries[:: len(queries) // 8]:
            assert read.create_scheme_for_layer(query) is not None
        assert done["scans"] == 0
    assert costs[1] == pytest.approx(costs[0], rel=0.05)
    assert costs[1] < 10


def test_validation_is_linear(tmp_path: Path) -> None:
    """Whole passes over the description, however many keys it has."""
    costs = []
    for layers, experts in ((2, 8), (20, 128)):
        read, _, done = deepseek_like(tmp_path, layers, experts)
        assert list(examine(read.folder, read.description)) == []
        costs.append((done["look-ups"] / len(read.description.types), done["scans"]))
    assert costs[1][0] == pytest.approx(costs[0][0], rel=0.05)
    assert costs[1][1] == costs[0][1]
