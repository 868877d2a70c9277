"""config.json of a checkpoint folder."""

import json
from pathlib import Path

import pytest

from quant_core import CheckpointError, CheckpointFolder


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).config == {}


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null"])
def test_a_config_that_is_no_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json holds no object"):
        _ = CheckpointFolder(tmp_path).config


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (None, None),
        ({}, None),
        ({"quantization_config": {"quant_method": "ascend"}}, "ascend"),
        ({"text_config": {"quantization_config": {"quant_method": "ascend"}}}, "ascend"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {
                "compression_config": {"quant_method": "a"},
                "text_config": {"quantization_config": {"quant_method": "b"}},
            },
            "b",
        ),
        ({"text_config": [], "quantization_config": None}, None),
        ({"quantization_config": {"quant_method": 3}}, None),
        ({"quantization_config": {"quant_method": ""}}, None),
    ],
)
def test_the_declared_method(config: object, method: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert CheckpointFolder(tmp_path).declared_method == method
