"""Biases of linear layers that the architecture has without, as anti-outlier methods (m1, m2, m4) store them.

A norm shifts what it gives out, and the layers behind it take the shift back: W(x + shift) + b, b = -W shift.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import LoadError

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import ranks
from survey_table import TABLE
from versions import lacking

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

QWEN3 = "msmodelslim/qwen3"
GROUPED = f"{QWEN3}/W8A16_GROUP64"
SIZES = {"q": 128, "k": 64, "v": 64, "o": 128, "gate": 384, "up": 384, "down": 128}
FUSED = {"qkv_proj": ["q", "k", "v"], "o_proj": ["o"], "gate_up_proj": ["gate", "up"], "down_proj": ["down"]}


def add(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Store further tensors, described as FLOAT, in a file of their own."""
    save_file(tensors, folder / "quant_model_weights_more.safetensors", {"format": "pt"})
    (file,) = folder.glob("quant_model_description*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(tensors, "FLOAT")))
    return folder


def outputs(model: Any) -> dict[str, Tensor]:
    """What the linear layers of the second layer give for some input, by path."""
    from vllm.model_executor.layers.linear import LinearBase

    layer, found = model.model.layers[1], {}
    for path, module in layer.named_modules():
        if isinstance(module, LinearBase):
            x = torch.randn(5, module.input_size, generator=torch.Generator().manual_seed(1))
            found[path] = module(x)[0]
    return found


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("W8A8_DYNAMIC_SHARDED", ""),
        ("W8A16_ASYM", ""),
        ("W8A16_GROUP64", ""),
        ("V0_W4A16", ""),
        ("V0_W4A8_DYNAMIC_GROUP64", ""),
        ("W4A8_MXFP", ""),
        ("W4A4_FLATQUANT_DYNAMIC", ""),
        ("MIXED_LAYERS", "W8A8"),
        ("W8A8", "W8A8"),
    ],
)
def test_every_type_adds_them(
    name: str, inside: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """Float layers too; but not those whose integers hold the bias already."""
    folder = DATA / "checkpoints" / QWEN3 / name
    with load_model(folder) as model:
        plain = outputs(model)
    generator = torch.Generator().manual_seed(2)
    biases = {member: torch.randn(size, generator=generator) for member, size in SIZES.items()}
    paths = {m: f"model.layers.1.{'self_attn' if m in 'qkvo' else 'mlp'}.{m}_proj" for m in SIZES}
    (file,) = folder.glob("quant_model_description*.json")
    types = json.loads(file.read_text())
    copy = add(checkpoint(f"{QWEN3}/{name}"), {f"{paths[m]}.bias": bias for m, bias in biases.items()})
    with load_model(copy) as model:
        found = outputs(model)
    assert {path.rpartition(".")[2] for path in found} == FUSED.keys()
    for path, output in found.items():
        members = FUSED[path.rpartition(".")[2]]
        expected = torch.cat([biases[m] * (types[f"{paths[m]}.weight"] != inside) for m in members])
        difference = (output - plain[path]).mean(0)
        torch.testing.assert_close(difference, expected, rtol=0, atol=1e-4)


def shifted(folder: Path, factor: float = 1.0) -> Path:
    """Shift what the first norm of each layer gives out, and take the shift back in q, k and v."""
    (file,) = folder.glob("quant_model_weights*.safetensors")
    tensors, more = load_file(file), {}
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        shift = torch.randn(128, generator=generator)
        more[f"model.layers.{layer}.input_layernorm.bias"] = shift * factor
        for member in "qkv":
            module = f"model.layers.{layer}.self_attn.{member}_proj"
            scale, offset = (tensors[f"{module}.weight_{s}"].repeat_interleave(64, 1) for s in ("scale", "offset"))
            weight = (tensors[f"{module}.weight"].double() - offset) * scale
            more[f"{module}.bias"] = (-weight @ shift.double()).float()
    return add(folder, more)


def test_a_shift_that_is_taken_back(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """The answers are those without a shift, on two ranks as well; and after a reload of a wrong one."""
    wrong = shifted(checkpoint(GROUPED).rename(tmp_path / "wrong"), factor=0.5)
    right = shifted(checkpoint(GROUPED).rename(tmp_path / "right"))
    with start_engine(wrong) as llm:
        assert not reference.judge(GROUPED, ask(llm, reference.prompts), "float32")["ok"]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(right)})
        one = ask(llm, reference.prompts)
    two = ranks.Engine(right, reference.prompts, tensor_parallel_size=2).answers()
    for answers in (one, two):
        verdict = reference.judge(GROUPED, answers, "float32")
        assert verdict["ok"], verdict["why"]


@pytest.mark.parametrize(
    ("name", "module", "size"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj", 64),
        ("deepseek_v2", "model.layers.0.self_attn.kv_b_proj", 512),
    ],
)
def test_where_none_can_be_added(
    name: str, module: str, size: int, tmp_path: Path, load_model: Callable[..., Any]
) -> None:
    """Experts, and the projection that latent attention multiplies into others: vLLM would drop their biases."""
    if name == "deepseek_v2" and (reason := lacking("latent attention")):
        pytest.skip(reason)
    architectures.make(TABLE[name], tmp_path)
    add(tmp_path / "quant", {f"{module}.bias": torch.ones(size)})
    options = {"max_model_len": 128, "skip_tokenizer_init": True, **TABLE[name].engine}
    with pytest.raises(LoadError, match=rf"no place for 1 bias tensors of the checkpoint: {module}\.bias"):  # noqa: SIM117
        with load_model(tmp_path / "quant", **options):
            pass
