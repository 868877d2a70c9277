"""Real checkpoints of the real tool, served by real vLLM, judged by the reference's rule."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.methods.linear import AscendLinearMethod

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
MSMODELSLIM = DATA / "checkpoints" / "msmodelslim"

#: The types that are served, on linear layers and as caches.
SERVED = {
    "FLOAT",
    "C8",
    "W8A8",
    "W8A8S",
    "W8A8_DYNAMIC",
    "W8A8_MIX",
    "W8A16",
    "W4A16",
    "W4A8_DYNAMIC",
    "W4A4_DYNAMIC",
    "W4A4_FLATQUANT_DYNAMIC",
    "WFP8AFP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A8_MXFP",
    "W4A4_MXFP4",
    "W4A4_MXFP4_SVD",
    "W4A4_MXFP4_DUALSCALE",
    "W4A4_MXFP4_FLATQUANT",
}


def described_types(folder: Path) -> set[str]:
    """All types of a folder's description."""
    (file,) = folder.glob("quant_model_description*.json")
    content = json.loads(file.read_text())
    return {value for key, value in content.items() if "." in key and isinstance(value, str)}


def dense_checkpoints() -> list[str]:
    """Keys of the qwen3 and qwen2 folders whose types are all served."""
    folders = [p for model in ("qwen2", "qwen3") for p in sorted((MSMODELSLIM / model).iterdir())]
    return [str(p.relative_to(DATA / "checkpoints")) for p in folders if described_types(p) <= SERVED]


def test_there_is_something_to_serve() -> None:
    """A wrong data folder must not pass as an empty list of cases."""
    assert len(dense_checkpoints()) >= 8, f"only {dense_checkpoints()} in {MSMODELSLIM}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", dense_checkpoints())
def test_equal_to_the_reference(
    key: str, dtype: str, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """No argument tells vLLM how the folder is quantised; the numbers are those of the reference."""
    with start_engine(DATA / "checkpoints" / key, dtype=dtype) as llm:
        results = ask(llm, reference.prompts)
    verdict = reference.judge(key, results, dtype)
    assert verdict["ok"], verdict["why"]


def test_float16_is_served(start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any) -> None:
    """In its own dtype the float16 checkpoint is judged by the bfloat16 rule."""
    key = "msmodelslim/qwen3/W8A8_FP16"
    with start_engine(DATA / "checkpoints" / key, dtype="float16") as llm:
        results = ask(llm, reference.prompts)
    verdict = reference.judge(key, results, "bfloat16")
    assert verdict["ok"], verdict["why"]


def test_every_layer_has_the_type_that_the_description_gives(start_engine: Callable[..., Any]) -> None:
    """The engine's layers hold schemes, and the config can tell the evidence of each."""
    folder = MSMODELSLIM / "qwen3" / "W8A8"
    with start_engine(folder) as llm:
        config = llm.llm_engine.vllm_config.quant_config
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        methods = {path: getattr(module, "quant_method", None) for path, module in model.named_modules()}
        layers = dict(config.layers)
    assert isinstance(config, AscendQuantizationConfig)
    quantised = {path for path, method in methods.items() if isinstance(method, AscendLinearMethod)}
    assert quantised == {path for path, quant in layers.items() if quant.quant_type == "W8A8"}
    assert len(quantised) == 3 * 4  # qkv, o, gate_up, down of three layers
    claimed = [module for path in quantised for module in layers[path].modules]
    description = json.loads((folder / "quant_model_description.json").read_text())
    described = [k.removesuffix(".weight") for k, v in description.items() if k.endswith(".weight") and v == "W8A8"]
    assert sorted(claimed) == sorted(described)
    assert str(layers["model.layers.0.self_attn.qkv_proj"].evidence[0]) == (
        "quant_model_description.json: model.layers.0.self_attn.q_proj.weight = W8A8"
    )


def changed_copy(folder: Path, target: Path) -> Path:
    """The same checkpoint with other weights: scales halved, norms grown, codes mirrored."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if name.endswith(".deq_scale"):
            tensors[name] = tensor / 2
        elif name.endswith("layernorm.weight"):
            tensors[name] = tensor * 1.125
        elif tensor.dtype == torch.int8:
            tensors[name] = tensor.flip(0).contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name",
    ["W8A8", "W8A8_DYNAMIC_SHARDED", "W8A16_GROUP64", "W4A4_FLATQUANT_DYNAMIC", "V0_W4A8_DYNAMIC_GROUP64"],
)
def test_reload_in_place_gives_the_numbers_of_a_fresh_start(
    name: str, tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """First weights, others, the first again: each time exactly what a fresh engine answers."""
    first, prompts = MSMODELSLIM / "qwen3" / name, reference.prompts[:4]
    other = changed_copy(first, tmp_path / "other") if "SHARDED" not in name else None
    answers = {}
    for folder in filter(None, [other, first]):
        with start_engine(folder) as llm:
            answers[folder] = ask(llm, prompts)
            if folder == first:
                for reloaded in filter(None, [other, first]):
                    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(reloaded)})
                    assert ask(llm, prompts) == answers[reloaded]
    assert other is None or answers[other] != answers[first]
