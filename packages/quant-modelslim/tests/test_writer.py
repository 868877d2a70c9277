"""The plain quantiser: what it writes is a checkpoint, and it means the weights that it was given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_core import CheckpointFolder, LayerQuery, UnsupportedSchemeError, get_scheme_class
from quant_modelslim import ModelSlimFormat
from quant_modelslim.writer import quantize_weight, write_checkpoint

TENSORS = {
    "model.embed_tokens.weight": torch.randn(8, 32),
    "model.layers.0.up_proj.weight": torch.randn(64, 32),
    "model.layers.0.up_proj.bias": torch.randn(64),
    "model.layers.0.down_proj.weight": torch.randn(32, 64),
    "model.norm.weight": torch.ones(32),
}


def choose(module: str, _: torch.Tensor) -> str:
    return {"up_proj": "W8A8_DYNAMIC", "down_proj": "W8A16"}.get(module.rpartition(".")[2], "FLOAT")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "made", TENSORS, choose)
    read = ModelSlimFormat.load(CheckpointFolder(tmp_path / "made"))
    for module in ("model.layers.0.up_proj", "model.layers.0.down_proj"):
        scheme = read.create_scheme_for_layer(LayerQuery(module))
        assert type(scheme) is get_scheme_class(choose(module, torch.empty(0)), "linear")
    assert read.layer_quant(LayerQuery("model.embed_tokens")).quant_type is None
    assert read.description.types["model.layers.0.up_proj.bias"] == "FLOAT"
    stored = load_file(tmp_path / "made" / "quant_model_weights.safetensors")
    assert set(stored) == set(read.description.types)
    for name in ("model.embed_tokens.weight", "model.layers.0.up_proj.bias", "model.norm.weight"):
        assert torch.equal(stored[name], TENSORS[name])


@pytest.mark.parametrize("quant_type", ["W8A8_DYNAMIC", "W8A16"])
def test_weights_are_kept(quant_type: str) -> None:
    """Half a step at most, with the formula of the format."""
    weight = torch.randn(16, 32)
    parts = quantize_weight("a", weight, quant_type)
    scale = parts["weight_scale"]
    real = (parts["weight"] - parts["weight_offset"]) * scale
    assert bool(((real - weight).abs() <= scale / 2 * 1.0001).all())


def test_unknown_types(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSchemeError, match=r"'W9A9'(?s:.)*where: model\.layers\.0\.up_proj"):
        write_checkpoint(tmp_path, TENSORS, lambda module, _: "W9A9" if module.endswith("up_proj") else "FLOAT")


def test_other_files_are_copied(tmp_path: Path, small: Any) -> None:
    """All but those that belong to the source's weights; into a writable copy, whatever the source's mode."""
    source = small.write_shards(tmp_path / "source", 2)
    (source / "config.json").write_text('{"model_type": "any"}')
    (source / "config.json").chmod(0o444)
    (source / "README.md").write_text("not copied")
    write_checkpoint(tmp_path / "made", TENSORS, choose, files_from=source)
    made = sorted(file.name for file in (tmp_path / "made").iterdir())
    assert made == ["config.json", "quant_model_description.json", "quant_model_weights.safetensors"]
    assert json.loads((tmp_path / "made" / "quant_model_description.json").read_text())["model.norm.weight"] == "FLOAT"
    (tmp_path / "made" / "config.json").write_text("{}")
