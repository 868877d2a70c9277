"""All that is wrong with a folder is found at once, with its fields, and without raising."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import CheckpointError, CheckpointFolder, LoadError, QuantError, UnsupportedSchemeError
from quant_modelslim import ModelSlimFormat

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
DOWN = "model.layers.0.mlp.down_proj"


def damaged(small: Any) -> None:
    """Faults of four kinds, each in another layer."""
    small.description |= {key: "W3A3" for key in small.description if key.startswith(f"{K}.weight")}
    del small.tensors[f"{OUT}.weight_scale"]
    small.tensors[f"{DOWN}.weight_scale"] = torch.ones(7, 1)


def test_a_sound_folder_has_none(tmp_path: Path, small: Any) -> None:
    assert list(ModelSlimFormat.findings(CheckpointFolder(small.write(tmp_path)))) == []


def test_everything_at_once(tmp_path: Path, small: Any) -> None:
    damaged(small)
    folder = CheckpointFolder(small.write(tmp_path))
    findings = list(ModelSlimFormat.findings(folder))
    assert [finding.error for finding in findings][:2] == [UnsupportedSchemeError, CheckpointError]
    assert {finding.severity for finding in findings} == {"error"}
    texts = [str(finding) for finding in findings]
    for part in ("W3A3", f"{OUT}.weight_scale is described as", f"{DOWN}.weight_scale in"):
        assert any(part in text for text in texts), part
    assert [f.tensor for f in findings if f.error is CheckpointError] == [f"{OUT}.weight_scale"]
    with pytest.raises(QuantError) as raised:
        ModelSlimFormat.load(folder)
    assert list(raised.value.findings) == findings
    assert all(part in str(raised.value) for part in ("W3A3", f"{OUT}.weight_scale", f"{DOWN}.weight_scale"))


def test_what_follows_from_another_finding_is_left_out(tmp_path: Path, small: Any) -> None:
    """An absent tensor is not also a module of another form."""
    del small.tensors[f"{Q}.weight_scale"]
    (finding,) = ModelSlimFormat.findings(CheckpointFolder(small.write(tmp_path)))
    assert (finding.error, finding.tensor) == (CheckpointError, f"{Q}.weight_scale")


def test_a_folder_without_a_description_is_one_finding(tmp_path: Path, small: Any) -> None:
    (next(small.write(tmp_path).glob("quant_model_description.json"))).unlink()
    (finding,) = ModelSlimFormat.findings(CheckpointFolder(tmp_path))
    assert finding.error is CheckpointError
    assert "no quant_model_description" in finding.what


def test_an_error_of_one_kind_is_of_that_class(tmp_path: Path, small: Any) -> None:
    small.tensors[f"{DOWN}.weight_scale"] = torch.ones(7, 1)
    with pytest.raises(LoadError, match=r"weight_scale in .* expected") as raised:
        ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path)))
    assert len(raised.value.findings) == 1
