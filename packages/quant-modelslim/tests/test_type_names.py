"""Types that no scheme serves: those that are float load as such, others are refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant_core import CheckpointFolder, LayerQuery, UnsupportedSchemeError
from quant_modelslim import ModelSlimFormat
from quant_modelslim.type_names import UNUSABLE


def write(folder: Path, types: dict[str, str]) -> CheckpointFolder:
    """A folder with one linear layer."""
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "quant_model_description.json").write_text(json.dumps(types))
    save_file(
        {name: torch.zeros(8, 8, dtype=torch.bfloat16) for name in types}, folder / "quant_model_weights.safetensors"
    )
    return CheckpointFolder(folder)


@pytest.mark.parametrize("quant_type", UNUSABLE)
def test_a_type_without_a_usable_form_is_refused_with_the_reason(quant_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSchemeError) as raised:
        ModelSlimFormat.load(write(tmp_path, {"layers.0.q_proj.weight": quant_type}))
    assert f"'{quant_type}' cannot be served: {UNUSABLE[quant_type]}" in str(raised.value)
    assert "layers.0.q_proj.weight" in str(raised.value)


def test_pruned_float_weights_are_float(tmp_path: Path) -> None:
    quant_format = ModelSlimFormat.load(write(tmp_path, {"layers.0.q_proj.weight": "W16A16S"}))
    quant = quant_format.layer_quant(LayerQuery("layers.0.q_proj"))
    assert quant.quant_type is None
    assert quant.reason == "quant_model_description.json: layers.0.q_proj.weight = W16A16S"


def test_simulated_ranks_are_refused(tmp_path: Path) -> None:
    types = {f"layers.0.o_proj.{part}weight": "W8A8" for part in ("", "tp_list.0.", "tp_list.1.")}
    with pytest.raises(UnsupportedSchemeError, match=r"simulate_tp(?s:.)*o_proj.tp_list.0.weight"):
        ModelSlimFormat.load(write(tmp_path, types))
