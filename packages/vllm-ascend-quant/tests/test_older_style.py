"""A third party's package with a scheme in vllm-ascend's style (examples/older_style_scheme), installed and served."""

import json
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
KEY = "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED"


@pytest.fixture
def older_style(checkpoint: Callable[[str], Path]) -> Path:
    """W8A8_DYNAMIC under the name that the example registers, without the zero offsets that its hook asks for."""
    folder = checkpoint(KEY)
    file = folder / "quant_model_description.json"
    types = json.loads(file.read_text())
    offsets = [name for name in types if name.endswith(".weight_offset")]
    types = {k: "W8A8_OLDER_STYLE" if v == "W8A8_DYNAMIC" else v for k, v in types.items() if k not in offsets}
    file.write_text(json.dumps(types))
    (index,) = folder.glob("*.safetensors.index.json")
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if k not in offsets}
    index.write_text(json.dumps(content))
    for weights in folder.glob("*.safetensors"):
        tensors = {k: v for k, v in load_file(weights).items() if k not in offsets}
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def test_the_example_is_a_package_that_announces_its_scheme() -> None:
    """Under 80 lines, and installed as its users would have it."""
    files = [*(REPOSITORY / "examples" / "older_style_scheme").glob("*.py"), *REPOSITORY.glob("examples/older*/*.toml")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 80
    assert [entry.dist.name for entry in entry_points(group="quant_core.schemes") if entry.dist] == [
        "older-style-scheme"
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_and_reloaded(
    dtype: str, older_style: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """The numbers of the type that it does the same as, before and after a reload."""
    with start_engine(older_style, dtype=dtype) as llm:
        first = ask(llm, reference.prompts)
        llm.collective_rpc("reload_weights")
        second = ask(llm, reference.prompts)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        layer = model.get_submodule("model.layers.0.self_attn.qkv_proj")
        assert sorted(dict(layer.named_parameters())) == ["weight_packed", "weight_scale"]
        assert torch.equal(layer.weight_offset, torch.zeros(layer.weight_offset.shape))
    verdict = reference.judge(KEY, first, dtype)
    assert verdict["ok"], verdict["why"]
    assert first == second
