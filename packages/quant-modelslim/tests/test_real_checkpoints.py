"""What msModelSlim itself wrote: every folder is read and every layer resolved as its description says.

The description itself is the table of what is expected; nothing here knows the result for a folder.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors import safe_open

from quant_core import (
    AscendLinearScheme,
    CheckpointFolder,
    LayerQuery,
    UnsupportedSchemeError,
    detect_formats,
    get_scheme_class,
    list_schemes,
)
from quant_core.schemes.composed import ComposedLinearMethod
from quant_modelslim import ModelSlimFormat
from quant_modelslim.type_names import ATTENTION_SCHEMES

REPOSITORY = Path(__file__).parents[3]

#: The repository's copies, or all checkpoints.
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata") / "checkpoints" / "msmodelslim"

#: These must be there, whatever the folder; an absent one fails.
IN_REPOSITORY = {
    "qwen3/W8A8",
    "qwen3/W8A8_FP16",
    "qwen3/W8A8_DYNAMIC_SHARDED",
    "qwen3/W8A16_ASYM",
    "qwen3/W8A16_GROUP64",
    "qwen3/V0_W8A8_LEGACYNAMES",
    "qwen3/V0_W8A8_M4",
    "qwen3/MIXED_LAYERS",
    "qwen3/W8A8C8_ASYM",
    "qwen2/W8A8",
    "qwen2/W8A8_DYNAMIC",
    "qwen3-moe/W8A8_DYNAMIC",
}
CHECKPOINTS = sorted(IN_REPOSITORY | {str(p.parent.relative_to(DATA)) for p in DATA.glob("*/*/config.json")})

#: The ends of the names of tensors that belong to a cache.
OF_CACHES = (".kv_cache_scale", ".kv_cache_offset", *(f".fa_{part}.{x}" for part in "qkv" for x in ("scale", "offset")))

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def described(folder: Path) -> dict[str, str]:
    """The tensors' keys and the attention types, from the file itself."""
    (file,) = folder.glob("quant_model_description*.json")
    return {key: value for key, value in json.loads(file.read_text()).items() if "." in key}


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the files themselves."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes


def test_all_of_them_are_there() -> None:
    """With all data there is more than the repository's copies."""
    assert len(CHECKPOINTS) >= (35 if "ASCEND_QUANT_TEST_DATA" in os.environ else len(IN_REPOSITORY)), CHECKPOINTS


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_resolves_as_described(name: str) -> None:
    """Or is refused by an error that names every unsupported type and a key of each."""
    folder = DATA / name
    types, shapes = described(folder), stored(folder)
    assert [detection.format for detection in detect_formats(CheckpointFolder(folder))] == ["modelslim"]
    supported = {quant_type for quant_type, _ in list_schemes()} | {"FLOAT", *ATTENTION_SCHEMES}
    if unsupported := set(types.values()) - supported:
        with pytest.raises(UnsupportedSchemeError) as raised:
            ModelSlimFormat.load(CheckpointFolder(folder))
        message = str(raised.value)
        for quant_type in unsupported:
            assert f"{quant_type!r}" in message
            assert any(key in message for key, value in types.items() if value == quant_type)
        assert not any(f"type {quant_type!r}" in message for quant_type in supported)
        return
    read = ModelSlimFormat.load(CheckpointFolder(folder))
    of_attention = {key: value for key, value in types.items() if key.endswith(".quant_type")}
    assert dict(read.description.types) == {key: types[key] for key in types.keys() - of_attention.keys()}
    assert {f"{module}.quant_type": said for module, said in read.description.attention_types.items()} == of_attention
    modules = [key.removesuffix(".weight") for key in types if key.endswith(".weight")]
    for module in modules:
        check_module(read, module, types, shapes)
    check_caches(read, types, shapes)
    for parent in {module.rpartition(".")[0] for module in modules}:
        for fused, parts in FUSED.items():
            members = [f"{parent}.{part}" for part in parts]
            if set(members) <= set(modules):
                check_fused(read, f"{parent}.{fused}", members, types, shapes)


def check_module(read: ModelSlimFormat, module: str, types: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    """One module: its type, its scheme, its sizes, and a use for every tensor of it."""
    quant_type = types[f"{module}.weight"]
    quant = read.layer_quant(LayerQuery(module))
    assert quant.quant_type == (None if quant_type == "FLOAT" else quant_type)
    assert quant.evidence[0].key == f"{module}.weight"
    if quant_type == "FLOAT":
        return
    scheme = read.create_scheme_for_layer(LayerQuery(module))
    assert isinstance(scheme, AscendLinearScheme)
    own = scheme.base if isinstance(scheme, ComposedLinearMethod) else scheme
    assert type(own) is get_scheme_class(quant_type, "linear")
    assert scheme.context.output_size == rows(module, shapes)
    declared = scheme.params(scheme.context.input_size, scheme.context.output_size)
    there = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] == module}
    assert {scheme.context.form.name_of(suffix): param.shape for suffix, param in declared.items()} == {
        name: shape for name, shape in there.items() if not name.endswith((".bias", *OF_CACHES))
    }


def check_caches(read: ModelSlimFormat, types: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    """A cache for each attention module that the description names tensors of one for, with all of these."""
    described = {key: value for key, value in types.items() if key.endswith(OF_CACHES)}
    found = {t.name: quant for quant in read.caches.values() for t in quant.stored[0].tensors.values()}
    assert found.keys() == described.keys()
    for name, quant in found.items():
        assert name.startswith(f"{quant.modules[0]}.")
        said = types.get(f"{quant.modules[0]}.quant_type", described[name])
        assert quant.quant_type == {"INT8": "FAKQuant"}.get(said, said)  # of attention, where that is said by itself
        assert get_scheme_class(quant.quant_type or "", "attention") is not None
        assert {canonical.partition("_")[2] for canonical in quant.stored[0].tensors} == {"scale", "offset"}
        for tensor in quant.stored[0].tensors.values():
            assert tensor.shape == shapes[tensor.name]
            assert read.canonical_name(tensor.name) is None or ".fa_" in tensor.name


def rows(module: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Output features of a module: several may lie in one row of its weight, none of its scales."""
    return max(
        shapes[f"{module}.{suffix}"][0] for suffix in ("weight_scale", "weight") if f"{module}.{suffix}" in shapes
    )


def check_fused(
    read: ModelSlimFormat, layer: str, members: list[str], types: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> None:
    """The same modules, found through an engine's fused layer."""
    quant = read.layer_quant(LayerQuery(layer, packed_modules=FUSED))
    (quant_type,) = {types[f"{member}.weight"] for member in members}
    assert quant.quant_type == (None if quant_type == "FLOAT" else quant_type)
    assert list(quant.modules) == members
    scheme = read.create_scheme_for_layer(LayerQuery(layer, packed_modules=FUSED))
    if scheme is not None:
        sizes = {shard.name: shard.output_size for shard in scheme.context.shards}
        assert sizes == {member: rows(member, shapes) for member in members}


def test_every_kind_of_writer_is_among_them() -> None:
    """Otherwise the list above says less than it seems to."""
    files = defaultdict(set)
    for name in CHECKPOINTS:
        for file in (DATA / name).iterdir():
            files["legacy"] |= {name} if file.name.startswith("quant_model_description_") else set()
            files["sharded"] |= {name} if file.name.endswith(".index.json") else set()
            files["old weights"] |= {name} if file.name.startswith("quant_model_weight_") else set()
    assert all(files[kind] for kind in ("legacy", "sharded", "old weights"))
