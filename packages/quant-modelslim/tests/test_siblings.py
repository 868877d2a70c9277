"""Experts that differ from the others are named in the front process, without a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import CheckpointFolder, QuantError
from quant_modelslim import ModelSlimFormat

DATA = Path(__file__).parents[3] / "testdata"
MOE = DATA / "checkpoints/msmodelslim/qwen3-moe"
LAYER = "model.layers.1.mlp.experts"

Change = Callable[[dict[str, str], dict[str, Tensor]], None]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of a checkpoint with experts in which description and tensors were changed."""

    def make(change: Change) -> Path:
        (source,) = [folder for folder in MOE.iterdir() if folder.name == "W8A8_DYNAMIC"]
        folder = tmp_path / "changed"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        (file,) = folder.glob("quant_model_description*.json")
        (weights,) = folder.glob("*.safetensors")
        description, tensors = json.loads(file.read_text()), load_file(weights)
        change(description, tensors)
        file.write_text(json.dumps(description))
        save_file(tensors, weights, metadata={"format": "pt"})
        return folder

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(QuantError) as raised:
        ModelSlimFormat.load(CheckpointFolder(folder))
    return str(raised.value)


def without(prefix: str) -> Change:
    def change(description: dict[str, str], tensors: dict[str, Tensor]) -> None:
        for content in (description, tensors):
            for name in [name for name in content if name.startswith(prefix)]:
                del content[name]  # type: ignore[attr-defined]

    return change


def test_a_sound_one_passes(changed: Callable[[Change], Path]) -> None:
    ModelSlimFormat.load(CheckpointFolder(changed(lambda *_: None)))


def test_a_missing_projection(changed: Callable[[Change], Path]) -> None:
    message = refusal(changed(without(f"{LAYER}.3.up_proj.")))
    assert f"{LAYER}: 1 projections of experts are absent" in message
    assert f"nothing of {LAYER}.3.up_proj, which 23 others have" in message


def test_a_missing_expert(changed: Callable[[Change], Path]) -> None:
    message = refusal(changed(without(f"{LAYER}.7.")))
    assert f"{LAYER} has 7" in message
    assert "expected: 8" in message


def test_a_surplus_expert(changed: Callable[[Change], Path]) -> None:
    def change(description: dict[str, str], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{LAYER}.7.")]:
            other = name.replace(f"{LAYER}.7.", f"{LAYER}.8.")
            tensors[other], description[other] = tensors[name].clone(), description[name]

    message = refusal(changed(change))
    assert f"{LAYER} has 9" in message


def test_an_expert_of_another_type(changed: Callable[[Change], Path]) -> None:
    def change(description: dict[str, str], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in description if name.startswith(f"{LAYER}.5.down_proj.")]:
            description[name] = "W8A16"

    message = refusal(changed(change))
    assert f"found: {LAYER}.5.down_proj is W8A16; the other 7 are W8A8_DYNAMIC" in message
