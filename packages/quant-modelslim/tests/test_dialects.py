"""Every writer's names and habits (docs/formats/modelslim.md, sections 1 to 3): all of them mean the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import CheckpointError, CheckpointFolder, LayerQuery, UnsupportedSchemeError
from quant_modelslim import ModelSlimFormat

GLOBAL = ("version", "model_quant_type", "group_size", "metadata", "optional")


def newest(content: Any, folder: Path) -> None:
    content.write(folder)


def newest_sharded(content: Any, folder: Path) -> None:
    content.write_shards(folder, 3)


def newest_one_shard(content: Any, folder: Path) -> None:
    content.write_shards(folder, 1)


def ascend_v1(content: Any, folder: Path) -> None:
    for key in ("metadata", "optional", "group_size"):
        del content.description[key]
    content.write(folder, weights="quant_model_weight_w8a8.safetensors")


def legacy(content: Any, folder: Path) -> None:
    for key in GLOBAL:
        del content.description[key]
    content.description["model_quant_type"] = "W8A8"
    for name in [n for n in content.tensors if n.endswith(".deq_scale")]:
        module = name.rpartition(".")[0]
        rows = content.tensors[name].shape[0]
        for suffix in ("weight_scale", "weight_offset"):
            content.tensors[f"{module}.{suffix}"] = torch.ones(rows, 1, dtype=torch.bfloat16)
            content.description[f"{module}.{suffix}"] = "W8A8"
    content.write(folder, "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json")


def mindie(content: Any, folder: Path) -> None:
    del content.description["version"]
    content.write(folder, "quant_model_weight_w8a8_dynamic.safetensors", "quant_model_description_w8a8_dynamic.json")
    (folder / "config.json").write_text(
        '{"quantize": "w8a8_dynamic", "moe_quantize": "w8a8_dynamic", '
        '"quantization_config": {"fa_quant_type": null, "kv_quant_type": null, "group_size": 0}}'
    )


def example_script(content: Any, folder: Path) -> None:
    content.description.update(dict.fromkeys(("fa_quant_type", "kv_quant_type", "version", "group_size", "tomorrow")))
    content.write(folder)


def reordered(content: Any, folder: Path) -> None:
    content.description = dict(sorted(content.description.items(), reverse=True))
    content.tensors = dict(sorted(content.tensors.items(), reverse=True))
    content.write(folder)


def float16_model(content: Any, folder: Path) -> None:
    """deq_scale as the bits of float32 in int64."""
    for name in [n for n in content.tensors if n.endswith(".deq_scale")]:
        content.tensors[name] = content.tensors[name].view(torch.int32).to(torch.int64)
    content.write(folder)


def meta_tensors(content: Any, folder: Path) -> None:
    """A FLOAT key was written, the tensor then left out."""
    content.description["model.visual.patch_embed.weight"] = "FLOAT"
    content.write(folder)


def undescribed_parts(content: Any, folder: Path) -> None:
    """Some routes leave whole float parts out of the description."""
    content.tensors["model.layers.2.eh_proj.weight"] = torch.zeros(8, 8)
    content.tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.zeros(8)
    content.write(folder)


WRITERS = [
    newest,
    newest_sharded,
    newest_one_shard,
    ascend_v1,
    legacy,
    mindie,
    example_script,
    reordered,
    float16_model,
    meta_tensors,
    undescribed_parts,
]


def types_of(folder: Path, packed_modules: dict[str, list[str]], prefix: str = "") -> dict[str, str | None]:
    """Every layer's type, with a scheme made for each."""
    read = ModelSlimFormat.load(CheckpointFolder(folder))
    found = {}
    for i in range(2):
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            query = LayerQuery(f"{prefix}model.layers.{i}.{part}", packed_modules=packed_modules)
            found[f"{i}.{part}"] = read.layer_quant(query).quant_type
            assert (read.create_scheme_for_layer(query) is None) == (found[f"{i}.{part}"] is None)
    return found


EXPECTED = {
    "0.self_attn.qkv_proj": "W8A8_DYNAMIC",
    "0.self_attn.o_proj": "W8A8_DYNAMIC",
    "0.mlp.gate_up_proj": "W8A16",
    "0.mlp.down_proj": "W8A16",
    "1.self_attn.qkv_proj": "W8A8",
    "1.self_attn.o_proj": "W8A8",
    "1.mlp.gate_up_proj": None,
    "1.mlp.down_proj": None,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer(
    tmp_path: Path, small: Any, packed_modules: dict[str, list[str]], writer: Callable[[Any, Path], None]
) -> None:
    writer(small, tmp_path)
    assert types_of(tmp_path, packed_modules) == EXPECTED


def test_a_prefix_on_every_key(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """The adapter that prefixes everything also overwrites the index by the bare weight map."""
    small.description = {f"thinker.{key}": value for key, value in small.description.items()}
    small.tensors = {f"thinker.{key}": value for key, value in small.tensors.items()}
    small.write_shards(tmp_path, 2, bare_index=True)
    assert types_of(tmp_path, packed_modules, "thinker.") == EXPECTED


def test_attention_types_are_no_tensors(tmp_path: Path, small: Any) -> None:
    """`<attn>.quant_type` has no tensor: a type is refused if no attention scheme has its name, for no other reason."""
    small.description["model.layers.0.self_attn.quant_type"] = "INT5"
    small.description["fa_quant_type"] = "FAKQuant"
    with pytest.raises(
        UnsupportedSchemeError, match=r"'INT5' on attention layers(?s:.)*model\.layers\.0\.self_attn\.quant_type"
    ):
        ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path)))


def test_links_as_in_the_hugging_face_cache(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    blobs = small.write_shards(tmp_path / "blobs", 2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        target = file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / target.name)
    assert types_of(snapshot, packed_modules) == EXPECTED


def test_stray_files(tmp_path: Path, small: Any, packed_modules: dict[str, list[str]]) -> None:
    """What is neither weights nor description does not matter, whatever it holds."""
    small.write(tmp_path)
    for name in ("README.md", "notes.json", "training.bin", "weights.safetensors.bak"):
        (tmp_path / name).write_bytes(b"\xff not JSON")
    for name in ("._quant_model_description.json", "._quant_model_weights.safetensors"):  # what macOS leaves behind
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "old.safetensors").mkdir()
    (tmp_path / "optional").mkdir()
    (tmp_path / "optional" / "quarot.safetensors").write_bytes(b"not ours to read")
    assert types_of(tmp_path, packed_modules) == EXPECTED


def test_a_left_over_file(tmp_path: Path, small: Any) -> None:
    """An engine loads every weights file and lets the last one win."""
    small.write(tmp_path)
    small.write(tmp_path / "old")
    (tmp_path / "old" / "quant_model_weights.safetensors").rename(tmp_path / "zz_old.safetensors")
    with pytest.raises(CheckpointError, match=r"two files hold the tensor .*zz_old\.safetensors"):
        ModelSlimFormat.load(CheckpointFolder(tmp_path))


@pytest.mark.parametrize("file", ["../weights.safetensors", "/weights.safetensors", "sub/../../weights.safetensors"])
def test_an_index_that_leaves_the_folder(tmp_path: Path, small: Any, file: str) -> None:
    folder = small.write_shards(tmp_path / "model", 2)
    index = folder / "quant_model_weights.safetensors.index.json"
    index.write_text(index.read_text().replace("quant_model_weights-00002-of-00002.safetensors", file))
    with pytest.raises(CheckpointError, match=r"safetensors\.index\.json names a file outside the folder"):
        ModelSlimFormat.load(CheckpointFolder(folder))


def test_a_shard_that_is_not_there(tmp_path: Path, small: Any) -> None:
    folder = small.write_shards(tmp_path, 3)
    (folder / "quant_model_weights-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not in the folder: quant_model_weights-00002-of-00003\.safetensors"):
        ModelSlimFormat.load(CheckpointFolder(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"\x80\x03}q\x00.", "6 bytes"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, small: Any, content: bytes, said: str) -> None:
    """One of several shards; the error names it and says what it is."""
    folder = small.write_shards(tmp_path, 2)
    (folder / "quant_model_weights-00002-of-00002.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s)quant_model_weights-00002-of-00002\.safetensors.*{said}"):
        ModelSlimFormat.load(CheckpointFolder(folder))
