"""Norms that the oldest writer stores twice, as `<norm>` and as `<norm>.module`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_core import CheckpointError, CheckpointFolder, LoadError
from quant_modelslim import ModelSlimFormat

NORM = "model.norm"


def wrap(content: Any, described: str = "W8A8") -> None:
    """As the writer stores the norm that an anti-outlier method has put into a module of its own."""
    content.tensors[f"{NORM}.bias"] = torch.linspace(-1, 1, len(content.tensors[f"{NORM}.weight"]))
    content.description[f"{NORM}.bias"] = "FLOAT"
    for suffix in ("weight", "bias"):
        content.tensors[f"{NORM}.module.{suffix}"] = content.tensors[f"{NORM}.{suffix}"].clone()
        content.description[f"{NORM}.module.{suffix}"] = described


@pytest.mark.parametrize("described", ["W8A8", "W8A8_DYNAMIC", "FLOAT"])
def test_a_copy_is_left_out(tmp_path: Path, small: Any, described: str) -> None:
    """Of the second pair no tensor is loaded; it is the model's type that describes it."""
    wrap(small, described)
    read = ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path)))
    names = (f"{NORM}.weight", f"{NORM}.bias", f"{NORM}.module.weight", f"{NORM}.module.bias")
    assert [read.canonical_name(name) for name in names] == [f"{NORM}.weight", f"{NORM}.bias", None, None]
    assert not read.modules[f"{NORM}.module"].tensors


@pytest.mark.parametrize("suffix", ["weight", "bias"])
@pytest.mark.parametrize("shards", [1, 3])
def test_two_norms_are_refused(tmp_path: Path, small: Any, suffix: str, shards: int) -> None:
    """Two values for one norm: both names are told."""
    wrap(small)
    small.tensors[f"{NORM}.module.{suffix}"][3] += 0.5
    folder = CheckpointFolder(small.write_shards(tmp_path, shards))
    with pytest.raises(CheckpointError, match=rf"{NORM}\.{suffix} in .* and {NORM}\.module\.{suffix} in") as raised:
        ModelSlimFormat.load(folder)
    assert [finding.tensor for finding in raised.value.findings] == [f"{NORM}.module.{suffix}"]


def test_what_is_no_norm_is_judged_as_ever(tmp_path: Path, small: Any) -> None:
    """A matrix below `.module` is a layer of its own."""
    layer = "model.layers.0.self_attn.q_proj"
    small.tensors[f"{layer}.module.weight"] = small.tensors[f"{layer}.weight"].clone()
    small.description[f"{layer}.module.weight"] = "W8A8_DYNAMIC"
    with pytest.raises(LoadError, match=rf"{layer}\.module\.weight_scale is absent"):
        ModelSlimFormat.load(CheckpointFolder(small.write(tmp_path)))
