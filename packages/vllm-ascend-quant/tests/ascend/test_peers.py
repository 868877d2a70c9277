"""Our schemes beside vllm-ascend's own: the same checkpoint, the same inputs, our CPU kernels under both.

The layers are vllm-ascend's, and each side loads the files by its own means.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import platform_model
import pytest
import torch
from platform_model import Answer
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core.devices import planned_device


@functools.cache
def both(folder: Path, product: str) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """What our layers answer, and theirs."""
    found = []
    for change in (lambda config, _: config, platform_model.with_peers_config):
        config = change(platform_model.on_cpu(platform_model.front(folder)), folder)
        with planned_device(product), platform_model.loaded(config) as model:
            found.append(platform_model.answers(config, model))
    return found[0], found[1]


def apart(ours: dict[str, Answer], theirs: dict[str, Answer]) -> list[str]:
    """The layers whose outputs are not the same bits."""
    assert ours.keys() == theirs.keys()
    return [name for name, answer in ours.items() if not torch.equal(answer.output, theirs[name].output)]


#: Checkpoints that both sides serve, and the product whose run-time form our weights take.
SERVED_BY_BOTH = {
    "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED": "910B",
    "msmodelslim/qwen3/W8A8_MIX_C8": "910B",
    "msmodelslim/qwen3/W4A4_MXFP4": "950",
    "msmodelslim/qwen3/W4A8_MXFP": "950",
    "msmodelslim/qwen3/W8A8_MXFP8": "950",
    "llmcompressor/qwen3/W8A8_DYNAMIC": "910B",
}


@pytest.mark.parametrize("name", SERVED_BY_BOTH)
def test_outputs_are_the_same_bits(name: str, checkpoints: Path) -> None:
    ours, theirs = both(folder_of(checkpoints, name), SERVED_BY_BOTH[name])
    assert len({answer.scheme for answer in ours.values()}) > 1
    assert apart(ours, theirs) == []


@pytest.mark.parametrize("name", [*SERVED_BY_BOTH, "msmodelslim/qwen3/W8A8", "msmodelslim/qwen3-moe/W8A8_DYNAMIC"])
def test_a_layer_makes_no_more_calls(name: str, checkpoints: Path) -> None:
    ours, theirs = both(folder_of(checkpoints, name), SERVED_BY_BOTH.get(name, "910B"))
    calls = {layer: (dict(answer.calls), dict(theirs[layer].calls)) for layer, answer in ours.items()}
    assert any(mine for mine, _ in calls.values())
    more = {layer: pair for layer, pair in calls.items() if sum(pair[0].values()) > sum(pair[1].values())}
    assert more == {}


def test_experts_are_the_same_bits_through_the_dispatcher(checkpoints: Path) -> None:
    ours, theirs = both(checkpoints / "msmodelslim/qwen3-moe/W8A8_DYNAMIC", "910B")
    experts = [layer for layer in ours if layer.endswith(".experts")]
    assert experts
    for layer in experts:
        assert ours[layer].output.abs().max() > 0
        assert torch.equal(ours[layer].output, theirs[layer].output)


def test_static_inputs_are_multiplied_by_a_reciprocal_in_the_models_dtype_by_vllm_ascend(
    checkpoints: Path, tmp_path: Path
) -> None:
    """The difference of W8A8 layers: where scale and reciprocal are exact in bfloat16 there is none."""
    folder = checkpoints / "msmodelslim/qwen3/W8A8"
    ours, theirs = both(folder, "910B")
    tensors = load_file(next(folder.glob("*.safetensors")))
    down = [layer for layer in apart(ours, theirs) if layer.endswith("down_proj")]
    assert down
    for layer in down:
        stored = {
            part: tensors[f"{layer}.{part}"].double()
            for part in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        }
        x = input_of(layer, stored["weight"].shape[1]).double()
        codes = (x / stored["input_scale"] + stored["input_offset"]).round().clamp(-128, 127)
        exact = (codes @ stored["weight"].t() + stored["quant_bias"]) * stored["deq_scale"]
        assert error(ours[layer].output, exact) < 0.003  # of rounding to bfloat16
        assert error(theirs[layer].output, exact) > 0.003

    def power_of_two(name: str, value: Tensor) -> Tensor:
        return value.log2().round().exp2() if name.endswith("input_scale") else value

    ours, theirs = both(changed(folder, tmp_path / "powers", power_of_two), "910B")
    assert apart(ours, theirs) == []


def test_asymmetric_w8a16_weights_are_multiplied_with_the_wrong_sign_of_the_offset_by_vllm_ascend(
    checkpoints: Path, tmp_path: Path
) -> None:
    folder = checkpoints / "msmodelslim/qwen3/W8A16_ASYM"
    ours, theirs = both(folder, "910B")
    wrong = apart(ours, theirs)
    tensors = load_file(next(folder.glob("*.safetensors")))
    for layer in wrong:
        if not layer.endswith(("o_proj", "down_proj")):  # fused ones have several modules
            continue
        scale, offset = (tensors[f"{layer}.weight_{part}"].float() for part in ("scale", "offset"))
        weight = (tensors[f"{layer}.weight"].float() - offset) * scale
        expected = input_of(layer, weight.shape[1]).float() @ weight.t()
        assert error(ours[layer].output, expected) < 0.01
        assert error(theirs[layer].output, expected) > 0.3
    assert any(layer.endswith("o_proj") for layer in wrong)

    def symmetric(name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if name.endswith("weight_offset") else value

    ours, theirs = both(changed(folder, tmp_path / "symmetric", symmetric), "910B")
    assert apart(ours, theirs) == []


def test_w4a4_dynamic_passes_through_float16_in_vllm_ascend(checkpoints: Path) -> None:
    """Its output is rounded to float16 on the way to bfloat16, and is infinite where float16 ends."""
    ours, theirs = both(checkpoints / "msmodelslim/qwen3/W4A4_DYNAMIC", "910B")
    different = apart(ours, theirs)
    assert different
    for layer in different:
        assert ours[layer].scheme == "AscendW4A4DynamicLinearMethod"
        assert error(ours[layer].output, theirs[layer].output.float()) < 0.003


@pytest.mark.parametrize(
    "name", ["W8A16_GROUP64", "W4A4_FLATQUANT_DYNAMIC", "W4A8_DYNAMIC", "V0_W8A8_LEGACYNAMES", "WFP8AFP8_DYNAMIC"]
)
def test_checkpoints_that_only_ours_loads(name: str, checkpoints: Path) -> None:
    folder = folder_of(checkpoints, f"msmodelslim/qwen3/{name}")
    config = platform_model.on_cpu(platform_model.front(folder))
    with planned_device("910B" if name != "WFP8AFP8_DYNAMIC" else "950"), platform_model.loaded(config) as model:
        assert platform_model.answers(config, model)
    with pytest.raises((AssertionError, ArithmeticError, NotImplementedError, ValueError)):  # noqa: PT012
        config = platform_model.with_peers_config(platform_model.on_cpu(platform_model.front(folder)), folder)
        with platform_model.loaded(config):
            pass


def folder_of(checkpoints: Path, name: str) -> Path:
    folder = checkpoints / name
    if not folder.is_dir():
        pytest.fail(f"{folder} is not there: these tests need all checkpoints, ASCEND_QUANT_TEST_DATA=../shared")
    return folder


def input_of(layer: str, inputs: int) -> Tensor:
    """As `platform_model.answers` draws it."""
    return torch.randn(platform_model.ROWS, inputs, generator=torch.Generator().manual_seed(len(layer))).bfloat16()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def changed(folder: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    target.chmod(0o755)
    for file in target.glob("*.safetensors"):
        tensors = {name: change(name, value).contiguous() for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert json.loads((target / "config.json").read_text())
    return target
