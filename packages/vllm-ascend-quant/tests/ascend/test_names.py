"""Who serves `ascend` and `compressed-tensors` beside the real vllm-ascend, in every kind of process."""

from collections.abc import Callable
from pathlib import Path

import pytest

# Which of two distributions Python finds first depends on the order in which they were installed.
FRONT = """
import importlib.metadata, pickle, sys
from pathlib import Path
order, *folders, out = sys.argv[1:]
entry_points = importlib.metadata.entry_points
def in_order(**wanted):
    found = entry_points(**wanted)
    return list(found)[::-1] if order == "reversed" and wanted.get("group", "").startswith("vllm.") else found
importlib.metadata.entry_points = in_order
import platform_model
configs = [platform_model.front(Path(folder)) for folder in folders]
for config in configs:
    print("serves", type(config.quant_config).__module__, config.model_config.quantization)
with open(out, "wb") as file:
    pickle.dump([config.quant_config for config in configs], file)
"""

#: What an engine core and a worker do: plugins, then the pickled configuration; and a draft asks by name once more.
WORKER = """
import pickle, sys
import torch, torch_npu
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm_ascend.quantization import compressed_tensors_config, modelslim_config  # as its models do
from vllm.model_executor.layers.quantization import get_quantization_config
with open(sys.argv[1], "rb") as file:
    for config in pickle.load(file):
        print("serves", type(config).__module__, len(config.format.modules) > 10)
for name in ("ascend", "compressed-tensors"):
    print(name, get_quantization_config(name).__module__)
"""


def folders(checkpoints: Path) -> list[str]:
    names = ("msmodelslim/qwen3/W8A8", "llmcompressor/qwen3/W8A8_DYNAMIC")
    return [str(checkpoints / name) for name in names]


@pytest.mark.parametrize("order", ["as found", "reversed"])
def test_both_formats_are_ours_in_front_and_in_workers(
    order: str, checkpoints: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    pickled = str(tmp_path / "configs")
    front = run_python(FRONT, order, *folders(checkpoints), pickled)
    assert "serves vllm_ascend_quant.config ascend" in front
    assert "serves vllm_ascend_quant.config compressed-tensors" in front
    worker = run_python(WORKER, pickled)
    assert worker.count("serves vllm_ascend_quant.config True") == 2
    assert "ascend vllm_ascend_quant.config" in worker
    assert "compressed-tensors vllm_ascend_quant.config" in worker


@pytest.mark.parametrize("order", ["as found", "reversed"])
def test_a_switch_leaves_the_names_to_vllm_ascend(
    order: str, checkpoints: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    pickled = str(tmp_path / "configs")
    front = run_python(FRONT, order, *folders(checkpoints), pickled, VLLM_ASCEND_QUANT_DISABLE="precedence")
    assert "serves vllm_ascend.quantization.modelslim_config ascend" in front
    assert "serves vllm_ascend.quantization.compressed_tensors_config compressed-tensors" in front
