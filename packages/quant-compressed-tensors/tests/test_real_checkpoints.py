"""What llm-compressor itself wrote: every folder is served with every tensor expected, or refused by name.

Weights are compared with the library's own decompression. The types stand here and not in the package: nothing of it
decides what is right.
"""

import importlib.util
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from small_folders import write_headers
from torch import Tensor, nn

from quant_compressed_tensors import CompressedTensorsFormat
from quant_compressed_tensors.section import Section
from quant_compressed_tensors.unserved import unserved_parts
from quant_core import (
    DOWN,
    GATE_UP,
    AscendLinearScheme,
    AscendMoEScheme,
    CheckpointFolder,
    ExpertSizes,
    LayerQuery,
    QuantError,
    detect_formats,
    get_scheme_class,
)
from quant_core.schemes.handover import hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.verify import absent_params, check_values, linear_params

REPOSITORY = Path(__file__).parents[3]

#: The repository's copies, or all checkpoints.
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata") / "checkpoints" / "llmcompressor"

#: The type of each folder's quantised modules; of some, by the last components of their names.
SERVED: dict[str, str | dict[str, str]] = {
    "qwen2/W4A16_GROUP": "W4A16",
    "qwen2/W8A8_DYNAMIC": "W8A8_DYNAMIC",
    "qwen2/W8A8_STATIC_ASYM": "W8A8",
    "qwen3/FP8_A16": "WFP8A16",
    "qwen3/FP8_BLOCK": "WFP8AFP8_BLOCK_DYNAMIC",
    "qwen3/FP8_BLOCK_MODELFREE": "WFP8AFP8_BLOCK_DYNAMIC",
    "qwen3/FP8_CHANNEL_STATIC": "WFP8AFP8",
    "qwen3/FP8_DYNAMIC": "WFP8AFP8_DYNAMIC",
    "qwen3/FP8_STATIC": "WFP8AFP8",
    "qwen3/MIXED_FP8_W8A8": {"self_attn": "W8A8_DYNAMIC", "mlp": "W8A8_DYNAMIC", "down_proj": "WFP8AFP8_DYNAMIC"},
    "qwen3/MIXED_W8A8_W4A16": {"self_attn": "W8A8_DYNAMIC", "mlp": "W4A16"},
    "qwen3/MXFP4": "W4A4_MXFP4",
    "qwen3/MXFP4A16": "W4A16_MXFP4",
    "qwen3/MXFP8": "W8A8_MXFP8",
    "qwen3/MXFP8A16": "W8A16_MXFP8",
    "qwen3/NVFP4": "W4A4_NVFP4",
    "qwen3/NVFP4A16": "W4A16_NVFP4",
    "qwen3/W4A16_ACTORDER_GROUP": "W4A16",
    "qwen3/W4A16_ACTORDER_STATIC": "W4A16",
    "qwen3/W4A16_ASYM": "W4A16",
    "qwen3/W4A16_ASYM_CT010": "W4A16",
    "qwen3/W4A16_CHANNEL": "W4A16",
    "qwen3/W4A16_CHANNEL_ASYM": "W4A16",
    "qwen3/W4A16_G128": "W4A16",
    "qwen3/W4A16_GROUP": "W4A16",
    "qwen3/W4A4_CHANNEL": "W4A4_DYNAMIC",
    "qwen3/W4A8_CHANNEL": "W4A8_DYNAMIC",
    "qwen3/W4A8_GROUP": "W4A8_DYNAMIC",
    "qwen3/W4A8_PACKED": "W4A8_DYNAMIC",
    "qwen3/W4AFP8": "W4AFP8_DYNAMIC",
    "qwen3/W8A16_CHANNEL": "W8A16",
    "qwen3/W8A16_EMBED_LMHEAD": "W8A16",
    "qwen3/W8A16_GROUP": "W8A16",
    "qwen3/W8A16_NAIVE": "W8A16",
    "qwen3/W8A8_DYNAMIC": "W8A8_DYNAMIC",
    "qwen3/W8A8_DYNAMIC_ASYM": "W8A8_DYNAMIC",
    "qwen3/W8A8_DYNAMIC_CT010": "W8A8_DYNAMIC",
    "qwen3/W8A8_DYNAMIC_IGNORE": "W8A8_DYNAMIC",
    "qwen3/W8A8_DYNAMIC_LMHEAD": "W8A8_DYNAMIC",
    "qwen3/W8A8_DYNAMIC_SQ_GPTQ": "W8A8_DYNAMIC",
    "qwen3/W8A8_GROUP_DYNAMIC": "W8A8_DYNAMIC",
    "qwen3/W8A8_MODELFREE_IGNORE": "W8A8_DYNAMIC",
    "qwen3/W8A8_STATIC": "W8A8",
    "qwen3/W8A8_STATIC_ASYM": "W8A8",
    "qwen3/W8A8_STATIC_ASYM_CT010": "W8A8",
    "qwen3/W8A8_TENSOR_DYNAMIC": "W8A8_DYNAMIC",
    "qwen3/W8A8_TENSOR_STATIC": "W8A8",
    "qwen3/W8ASYM_A8_DYNAMIC": "W8A8_DYNAMIC",
    "qwen3-moe/FP8_DYNAMIC": "WFP8AFP8_DYNAMIC",
    "qwen3-moe/MXFP4": "W4A4_MXFP4",
    "qwen3-moe/MXFP8": "W8A8_MXFP8",
    "qwen3-moe/W4A16_GROUP": "W4A16",
    "qwen3-moe/W4A8_CHANNEL": "W4A8_DYNAMIC",
    "qwen3-moe/W4A8_GROUP": "W4A8_DYNAMIC",
    "qwen3-moe/W8A8_DYNAMIC": "W8A8_DYNAMIC",
    "deepseek-v3/W8A8_DYNAMIC": "W8A8_DYNAMIC",
}

CACHE = "quantization_config.kv_cache_scheme", "a quantised key/value cache"
#: What is said of each of the others.
REFUSED: dict[str, tuple[str, ...]] = {
    "qwen3/FP8_DYNAMIC_ATTN_FP8": (*CACHE, "config_groups.group_0.input_activations", "alone, of Qwen3Attention"),
    "qwen3/FP8_DYNAMIC_KV_FP8": CACHE,
    "qwen3/FP8_DYNAMIC_KV_FP8_HEAD": CACHE,
    "qwen3/KV_FP8_CT010": CACHE,
    "qwen3/KV_FP8_ONLY": CACHE,
    "qwen3/W8A8_DYNAMIC_KV_INT8": CACHE,
    "qwen3/W3A16_GROUP": ("config_groups.group_0", "no operator takes weights of so many bits", "4 or 8 bits"),
    "qwen3/W4A16_SPINQUANT_R4": ("transform_config.config_groups.R4", "a transform of input at run time", "R1 and R2"),
    "qwen3/W8A8_FROZEN_DENSE": ("is stored in float beside the scales", ".weight (bfloat16", "save_compressed=True"),
    "qwen3/W8A8_OUTPUT_ACT": ("config_groups.group_0.output_activations", "quantised outputs"),
}

#: These must be there, whatever the folder; an absent one fails.
IN_REPOSITORY = {
    *("qwen3/FP8_BLOCK", "qwen3/MIXED_W8A8_W4A16", "qwen3/NVFP4", "qwen3/W4A16_ACTORDER_GROUP", "qwen3/W4A16_ASYM"),
    *("qwen3/W8A8_DYNAMIC", "qwen3/W8A8_STATIC_ASYM", "qwen3-moe/W4A8_CHANNEL"),
}


def completable(config: Path) -> bool:
    """Whether the tensors of a variant, or at least their headers, are there as well."""
    how = config.parent / "weights.json"
    return not how.exists() or (DATA / json.loads(how.read_text())["weights_from"]).is_dir()


CONFIGS = {"/".join(path.parts[-3:-1]): path for path in sorted(DATA.rglob("config.json"))}
CHECKPOINTS = sorted(IN_REPOSITORY | {name for name, path in CONFIGS.items() if completable(path)})

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED["fused_qkv_a_proj"] = ("q_a_proj", "kv_a_proj_with_mqa")


# --- folders ----------------------------------------------------------------------------------------------------------


def assembler() -> Any:
    """The program beside the variants that completes them."""
    spec = importlib.util.spec_from_file_location("assemble", DATA / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A complete folder by its name: as it is, put together, or with zeros for its values."""
    folders: dict[str, Path] = {}

    def found(name: str) -> Path:
        variant = DATA / "variants" / name
        if not variant.is_dir():
            return DATA / name
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("variant")
            if (variant / "weights.json").exists():
                assembler().assemble(name, folders[name])
            else:
                write_zeros(variant, folders[name])
        return folders[name]

    return found


def write_zeros(variant: Path, folder: Path) -> None:
    """A variant of which only headers are kept, with the shapes that its words say of themselves."""
    (folder / "config.json").write_text((variant / "config.json").read_text())
    listed = json.loads((variant / "tensors.json").read_text())
    headers = {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in listed.items()}
    config = json.loads((variant / "config.json").read_text())["quantization_config"]
    values = {}
    for name in headers:
        if name.endswith(".weight_shape"):
            (bits,) = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
            rows, words = headers[name.replace("weight_shape", "weight_packed")][1]
            values[name] = (rows, words * 32 // bits)
    write_headers(folder / "model.safetensors", headers, values)


def stored(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by module and suffix, from the files themselves."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                module, _, suffix = name.rpartition(".")
                shapes[module][suffix] = tuple(opened.get_slice(name).get_shape())
    return shapes


def is_quantised(tensors: dict[str, Any]) -> bool:
    return "weight_scale" in tensors


def expected(name: str, module: str) -> str:
    types = SERVED[name]
    if isinstance(types, str):
        return types
    return next(types[part] for part in reversed(module.split(".")) if part in types)


# --- the whole of it --------------------------------------------------------------------------------------------------


def test_all_of_them_are_there() -> None:
    """With all data there is more than the repository's copies; nothing is there of which nothing is expected."""
    assert len(CHECKPOINTS) >= (66 if "ASCEND_QUANT_TEST_DATA" in os.environ else len(IN_REPOSITORY)), CHECKPOINTS
    assert set(CONFIGS) <= SERVED.keys() | REFUSED.keys()
    assert not SERVED.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(SERVED.keys() & set(CHECKPOINTS)))
def test_resolves_with_every_tensor(name: str, complete: Any) -> None:
    folder = complete(name)
    assert [detection.format for detection in detect_formats(CheckpointFolder(folder))] == ["compressed-tensors"]
    read = CompressedTensorsFormat.load(CheckpointFolder(folder))
    modules = stored(folder)
    for module, tensors in modules.items():
        check_module(read, module, tensors, name)
    for parent in {module.rpartition(".")[0] for module in modules}:
        for fused, parts in FUSED.items():
            members = tuple(f"{parent}.{part}" for part in parts)
            if set(members) <= modules.keys():
                check_fused(read, f"{parent}.{fused}", members, modules, name)
    layers = {module.partition(".experts.")[0] + ".experts" for module in modules if ".experts." in module}
    for layer in layers:
        check_experts(read, layer, modules, name)
    assert bool(layers) == (name.startswith(("qwen3-moe", "deepseek")))
    assert [
        finding for finding in read.review({}) if "lm_head" not in finding.what and "gate'" not in finding.what
    ] == []


def check_module(read: CompressedTensorsFormat, module: str, tensors: dict[str, tuple[int, ...]], name: str) -> None:
    """One module: its type, its scheme, and a use for every tensor of it."""
    kind = "Embedding" if module.endswith("embed_tokens") else "lm_head" if module == "lm_head" else "Linear"
    query = LayerQuery(module, layer_class=kind)
    quant = read.layer_quant(query)
    if not is_quantised(tensors):
        assert quant.quant_type is None
        assert quant.reason
        return
    assert quant.quant_type == expected(name, module)
    assert quant.evidence[0].key.startswith("quantization_config.config_groups.")
    scheme = read.create_scheme_for_layer(query)
    assert isinstance(scheme, AscendLinearScheme)
    assert type(scheme) is get_scheme_class(quant.quant_type, "linear")
    declared = linear_params(scheme)
    assert {scheme.context.form.name_of(suffix): params[0].shape for suffix, params in declared.items()} == {
        f"{module}.{suffix}": shape for suffix, shape in tensors.items() if suffix not in ("bias", "weight_shape")
    }
    for suffix in tensors:  # what is loaded is what is declared
        canonical = read.canonical_name(f"{module}.{suffix}")
        assert (canonical is None) == (suffix == "weight_shape")
        assert canonical is None or suffix == "bias" or canonical.rpartition(".")[2] in declared


def check_fused(
    read: CompressedTensorsFormat, layer: str, members: tuple[str, ...], modules: dict[str, Any], name: str
) -> None:
    """The same modules as one layer of an engine."""
    query = LayerQuery(layer, modules=members)
    kinds = {expected(name, module) if is_quantised(modules[module]) else None for module in members}
    assert {read.layer_quant(query).quant_type} == kinds
    scheme = read.create_scheme_for_layer(query)
    if scheme is not None:
        assert isinstance(scheme, AscendLinearScheme)
        assert [shard.name for shard in scheme.context.shards] == list(members)
        linear_params(scheme)  # one form of all of them


def check_experts(read: CompressedTensorsFormat, layer: str, modules: dict[str, Any], name: str) -> None:
    """The experts of one layer."""
    count = 1 + max(int(module.split(".")[-2]) for module in modules if module.startswith(f"{layer}."))
    config = read.folder.config
    sizes = ExpertSizes(config["hidden_size"], config["moe_intermediate_size"], count)
    parts = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
    names = {half: tuple(tuple(f"{layer}.{e}.{p}" for p in own) for e in range(count)) for half, own in parts.items()}
    scheme = read.create_scheme_for_layer(LayerQuery(layer, "moe", experts=names, sizes=sizes))
    assert isinstance(scheme, AscendMoEScheme)
    assert type(scheme) is get_scheme_class(expected(name, layer), "moe")


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & set(CHECKPOINTS)))
def test_is_refused(name: str, complete: Any) -> None:
    with pytest.raises(QuantError) as raised:
        CompressedTensorsFormat.load(CheckpointFolder(complete(name)))
    for said in (*REFUSED[name], "what to do: "):
        assert said in str(raised.value)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_section_is_read(name: str) -> None:
    """Of variants too whose weights are elsewhere; and what is refused is refused for what the section says."""
    section = Section.read(CheckpointFolder(CONFIGS[name].parent))
    refused = [finding for finding in unserved_parts(section) if finding.severity == "error"]
    assert bool(refused) == (name in REFUSED and name not in ("qwen3/W3A16_GROUP", "qwen3/W8A8_FROZEN_DENSE"))


# --- values -----------------------------------------------------------------------------------------------------------

#: The folders whose values are there.
WITH_VALUES = [name for name in sorted(SERVED.keys() & set(CHECKPOINTS)) if (DATA / name).is_dir()]


@pytest.mark.parametrize("name", WITH_VALUES)
def test_weights_are_those_of_the_library(name: str, complete: Any) -> None:
    """Loaded as an engine does it, fused and single, and dequantised as stated; the library multiplies in bfloat16."""
    folder = complete(name)
    read = CompressedTensorsFormat.load(CheckpointFolder(folder))
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        group["weights"].pop("actorder", None)  # newer libraries refuse what older ones wrote
    parsed = QuantizationConfig.model_validate(config)
    layers = 0
    for members in layers_of(stored(folder)):
        quant = read.layer_quant(LayerQuery("layer", modules=members))
        if quant.quant_type is None:
            continue
        scheme = read.create_scheme_for_layer(LayerQuery("layer", modules=members))
        assert isinstance(scheme, AscendLinearScheme)
        group = parsed.config_groups[quant.evidence[0].key.rpartition(".")[2]]
        wanted = torch.cat([decompressed(module, tensors, group, parsed.format) for module in members])
        actual = dequantised(scheme, {read.canonical_name(key): value for key, value in tensors.items()})
        assert actual.shape == wanted.shape
        assert (actual - wanted).abs().max() <= 0.004 * wanted.abs().max()
        layers += 1
    assert layers >= 3


def layers_of(modules: dict[str, Any]) -> list[tuple[str, ...]]:
    """The linear layers of the last block as an engine has them, one expert, and head and embeddings."""
    last = max(int(module.split(".")[2]) for module in modules if module.startswith("model.layers."))
    prefix = f"model.layers.{last}"
    names = [(f"{prefix}.self_attn.{part}_proj" for part in "qkv"), [f"{prefix}.self_attn.o_proj"]]
    for mlp in (f"{prefix}.mlp", f"{prefix}.mlp.experts.1"):
        names += [[f"{mlp}.gate_proj", f"{mlp}.up_proj"], [f"{mlp}.down_proj"]]
    layers = [tuple(members) for members in [*names, ["lm_head"]]]
    return [members for members in layers if set(members) <= modules.keys()]


def dequantised(scheme: AscendLinearScheme, tensors: dict[str | None, Tensor]) -> Tensor:
    """The weight [out, in] of what an engine fills a layer with."""
    layer = nn.Module()
    stored, absent = (layouts_of(part(scheme), scheme.context) for part in (linear_params, absent_params))
    for suffix, layout in stored.items():
        value = torch.empty(layout.shape, dtype=layout.param.dtype)
        for member, shard in enumerate(scheme.context.shards):
            loaded = tensors[f"{shard.name}.{suffix}"]
            layout.part(value, member).copy_(loaded)
            check_values(shard.name, [f"{shard.name}.{suffix}"], layout.param, loaded)
        replace_parameter(layer, suffix, value)
    hand_over(layer, stored.values(), absent.values())
    return scheme.dequantize(layer)


def decompressed(module: str, tensors: dict[str, Tensor], group: Any, file_format: str) -> Tensor:
    """The weight of a module by the library, or by the specification where the library does not do it."""
    own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == module}
    if group.weights.block_structure is not None:
        rows, columns = group.weights.block_structure
        outputs, inputs = own["weight"].shape
        scale = own["weight_scale"].float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return own["weight"].float() * scale[:outputs, :inputs]
    if (index := own.get("weight_g_idx")) is not None:
        nibbles = [(own["weight_packed"] >> 4 * place) & 15 for place in range(8)]
        codes = torch.stack(nibbles, dim=-1).flatten(1) - 8
        return codes.float() * own["weight_scale"].float()[:, index.long()]
    compressor = BaseCompressor.get_value_from_registry(getattr(group.format, "value", group.format) or file_format)
    weight = compressor.decompress(own, group)["weight"]
    assert weight is not None
    return weight.float()
