"""Zeros: ordinary in single rows, in biases and in norms of 1 + weight; refused as a whole weight or a file's end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import CheckpointError, LoadError

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
from survey_table import TABLE

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

STATIC, DYNAMIC = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen2/W8A8_DYNAMIC"
WEIGHTS = "quant_model_weights.safetensors"
LAYER = "model.layers.1"
OPTIONS = {"max_model_len": 128, "skip_tokenizer_init": True}


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors of the one weights file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def zero(folder: Path, *names: str) -> Path:
    """Set tensors to zero."""
    return change(folder, lambda tensors: [tensors[name].zero_() for name in names])


@pytest.mark.parametrize(
    ("key", "name", "form"),
    [
        (STATIC, f"{LAYER}.self_attn.k_proj.weight", "int8 [64, 128]"),
        (DYNAMIC, f"{LAYER}.mlp.down_proj.weight", "int8 [128, 384]"),
        (STATIC, f"{LAYER}.input_layernorm.weight", "bfloat16 [128]"),
        (STATIC, f"{LAYER}.self_attn.q_norm.weight", "bfloat16 [32]"),
        (STATIC, "model.norm.weight", "bfloat16 [128]"),
        (STATIC, "model.embed_tokens.weight", "bfloat16 [512, 128]"),
        (STATIC, "lm_head.weight", "bfloat16 [512, 128]"),
        ("msmodelslim/qwen3/V0_W4A16", f"{LAYER}.mlp.up_proj.weight", "int8 [384, 64]"),
        ("msmodelslim/qwen3/W4A8_MXFP", f"{LAYER}.mlp.up_proj.weight", "uint8 [384, 64]"),
    ],
)
def test_a_weight_of_zeros_is_refused_unless_switched_off(
    key: str,
    name: str,
    form: str,
    checkpoint: Callable[[str], Path],
    load_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names tensor, file and switch; with the switch the model is loaded."""
    folder = zero(checkpoint(key), name)
    with pytest.raises(LoadError, match=f"{name} holds nothing but zeros") as raised, load_model(folder):
        pass
    for part in (f"zeros in all of {form}", "quant_model_weight", "VLLM_ASCEND_QUANT_DISABLE=zeros"):
        assert part in str(raised.value)
    monkeypatch.setenv("VLLM_ASCEND_QUANT_DISABLE", "zeros")
    with load_model(folder):
        pass


def mostly_zero(tensors: dict[str, Tensor]) -> None:
    """All rows but the last of every matrix, all biases, all of a norm but one entry."""
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            tensor[:-1].zero_()
        elif name.endswith("bias"):
            tensor.zero_()


@pytest.mark.parametrize("key", [STATIC, DYNAMIC])
def test_rows_and_biases_of_zeros_are_ordinary(
    key: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    with load_model(change(checkpoint(key), mostly_zero)):
        pass


def test_norms_of_one_plus_weight(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Zeros mean ones to them, which is what rotation (QuaRot) leaves of every norm."""
    architectures.make(TABLE["gemma2"], tmp_path)
    change(tmp_path / "quant", lambda tensors: [t.zero_() for n, t in tensors.items() if n.endswith("norm.weight")])
    with load_model(tmp_path / "quant", **OPTIONS):
        pass


def test_an_expert_of_zeros(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """In a module of its own, and as one of a stack."""
    architectures.make(TABLE["qwen3_moe"], tmp_path / "apart")
    name = f"{LAYER}.mlp.experts.2.up_proj.weight"
    folder = zero(tmp_path / "apart" / "quant", name)
    with pytest.raises(LoadError, match=f"{name} holds nothing but zeros"), load_model(folder, **OPTIONS):
        pass
    architectures.make(TABLE["llama4_text"], tmp_path / "stacked")
    folder = tmp_path / "stacked" / "quant"
    name = next(n for n in load_file(folder / WEIGHTS) if n.endswith("experts.gate_up_proj"))
    change(folder, lambda tensors: tensors[name][1].zero_())
    with pytest.raises(LoadError, match=rf"{name}\[1\] holds nothing but zeros"), load_model(folder, **OPTIONS):
        pass


def cut_short(folder: Path, kept: float) -> Path:
    """As an interrupted download leaves a file that was given its length before."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)].ljust(len(data), b"\0"))
    return folder


def test_a_file_that_ends_in_zeros(
    checkpoint: Callable[[str], Path],
    configure: Callable[..., Any],
    load_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused in the front process, before a tensor is read; made-up weights do not care."""
    folder = cut_short(checkpoint(STATIC), 0.67)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} ends in zeros: its last \d+ tensors") as raised:
        configure(folder)
    for part in ("model.layers.2.mlp.down_proj.weight", "VLLM_ASCEND_QUANT_DISABLE=zeros"):
        assert part in str(raised.value)
    with load_model(folder, load_format="dummy"):
        pass
    monkeypatch.setenv("VLLM_ASCEND_QUANT_DISABLE", "loaded, zeros")
    configure(folder)


def test_reloads_are_checked_as_well(
    tmp_path: Path, checkpoint: Callable[[str], Path], start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """By folder and by stream; the engine recovers."""
    good = DATA / "checkpoints" / STATIC
    tail = cut_short(checkpoint(STATIC).rename(tmp_path / "tail"), 0.8)
    norm = zero(checkpoint(STATIC).rename(tmp_path / "norm"), "model.norm.weight")
    prompts = [[1, *range(20, 40)]]
    with start_engine(good) as llm:
        before = ask(llm, prompts)
        with pytest.raises(CheckpointError, match="ends in zeros"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tail)})
        with pytest.raises(LoadError, match=r"model\.norm\.weight holds nothing but zeros"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(norm)})
        stream = {**load_file(good / WEIGHTS), "model.norm.weight": torch.zeros(128, dtype=torch.bfloat16)}
        with pytest.raises(LoadError, match=r"model\.norm\.weight holds nothing but zeros"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream.items())})
        llm.collective_rpc("reload_weights")
        assert ask(llm, prompts) == before
