"""The default engine mode, in which vLLM compiles the model: the tokens of eager, and weights that change under it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import envs
from vllm.config import CompilationMode

from quant_core import LimitError

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

KEYS = {
    "W8A8": "msmodelslim/qwen3/W8A8",
    "W8A8_DYNAMIC": "msmodelslim/qwen2/W8A8_DYNAMIC",
    "W8A16": "msmodelslim/qwen3/W8A16_GROUP64",
    "W4A4_FLATQUANT_DYNAMIC": "msmodelslim/qwen3/W4A4_FLATQUANT_DYNAMIC",
    "norms with a bias": "msmodelslim/qwen3/V0_W8A8_M4",
}


@pytest.fixture
def start_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_engine: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """As `start_engine` without enforce_eager, and with an empty cache of compiled code."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # vLLM sets it, and would for all tests

    def start(folder: Path, **options: Any) -> Any:
        envs.disable_envs_cache()  # the last engine of this process froze the variables
        return start_engine(folder, enforce_eager=False, **options)

    yield start
    envs.disable_envs_cache()
    torch.compiler.reset()


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other codes, scales, zero points' corrections and norms, of the same form."""
    factors = {"input_scale": 1.5, "deq_scale": 0.75, "weight_scale": 0.5, "norm.weight": 1.125, "norm.bias": 1.5}
    result = {}
    for name, tensor in tensors.items():
        factor = next((factor for ending, factor in factors.items() if name.endswith(ending)), None)
        flip = tensor.dtype == torch.int8 or name.endswith("quant_bias")
        result[name] = tensor * factor if factor else tensor.flip(0).contiguous() if flip else tensor
    return result


def put_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, weights_of(folder), metadata={"format": "pt"})


def generated(results: list[dict[str, Any]]) -> list[list[int]]:
    return [prompt["generated"] for prompt in results]


@pytest.mark.parametrize(
    "quant_type",
    [pytest.param(key, marks=pytest.mark.extended if key in ("W8A16", "W8A8_DYNAMIC") else ()) for key in KEYS],
)
def test_the_tokens_of_eager_and_reloads(
    quant_type: str,
    tmp_path: Path,
    start_compiled: Callable[..., Any],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """Weights and scales that change under compiled code give the numbers of a fresh start; so does the way back."""
    key = KEYS[quant_type]
    first = DATA / "checkpoints" / key
    other = shutil.copytree(first, tmp_path / "other", copy_function=shutil.copyfile)
    put_weights(other, changed(load_file(weights_of(first))))
    with start_engine(first) as llm:
        eager = ask(llm, reference.prompts)
    with start_compiled(first) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        found = ask(llm, reference.prompts)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        reloaded = ask(llm, reference.prompts)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(first)})
        assert ask(llm, reference.prompts) == found
    with start_compiled(other) as llm:
        assert ask(llm, reference.prompts) == reloaded
    assert generated(reloaded) != generated(found)
    verdicts = [reference.judge(key, results, "float32") for results in (eager, found)]
    assert all(verdict["ok"] for verdict in verdicts), [verdict["why"] for verdict in verdicts]
    # Where tokens differ, one of them is not the reference's: a tie, which its rule allows and counts.
    differing = sum(a != b for a, b in zip(generated(eager), generated(found), strict=True))
    assert differing <= sum(verdict["ties"] for verdict in verdicts)


def test_a_reload_that_compiled_code_cannot_take(
    tmp_path: Path, start_compiled: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """How many members share an input scale is compiled in: other sharing is refused, and a good reload recovers."""
    first = DATA / "checkpoints" / KEYS["W8A8"]
    other = shutil.copytree(first, tmp_path / "other", copy_function=shutil.copyfile)
    tensors = load_file(weights_of(first))
    tensors["model.layers.1.self_attn.k_proj.input_scale"] *= 1.5
    put_weights(other, tensors)
    with start_compiled(first) as llm:
        found = ask(llm, reference.prompts[:3])
        with pytest.raises(LimitError, match=r"layers\.1\.self_attn\.qkv_proj: the reloaded weights share"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(first)})
        assert ask(llm, reference.prompts[:3]) == found


@pytest.mark.parametrize("quant_type", ["W8A8", "W4A4_FLATQUANT_DYNAMIC"])
def test_real_weights_after_made_up_ones(
    quant_type: str,
    tmp_path: Path,
    start_compiled: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """Compiled with made-up values: the code must not hold what they say of scales that members share, or do not."""
    first = DATA / "checkpoints" / KEYS[quant_type]
    other = shutil.copytree(first, tmp_path / "other", copy_function=shutil.copyfile)
    own = {"k_proj.input_scale": 1.5, "v_proj.input_scale": 0.5, "k_proj.clip_ratio": 0.75, "up_proj.clip_ratio": 0.5}
    tensors = load_file(weights_of(first))
    put_weights(other, {n: t * own.get(".".join(n.split(".")[-2:]), 1) for n, t in tensors.items()})
    fresh = {}
    for folder in (first, other):
        with start_compiled(folder) as llm:
            fresh[folder] = ask(llm, reference.prompts)
    assert generated(fresh[first]) != generated(fresh[other])
    with start_compiled(first, load_format="dummy") as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        for folder in (other, first, other):
            stream = iter(load_file(weights_of(folder)).items())
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            assert ask(llm, reference.prompts) == fresh[folder]
