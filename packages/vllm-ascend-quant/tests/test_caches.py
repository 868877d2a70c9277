"""Quantised caches are as small as they say, and the order in which requests are computed changes nothing."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams, envs
from vllm.config import CompilationMode

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from caching import attention_layers, tokens_of_cache

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

C8, FLOAT_CACHE = "msmodelslim/qwen3/W8A8C8_ASYM", "msmodelslim/qwen3/W8A8"


def folder(key: str) -> Path:
    return DATA / "checkpoints" / key


def generate(llm: Any, prompts: list[list[int]], lengths: list[int] | None = None) -> list[list[int]]:
    """Greedy tokens."""
    sampling = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for tokens in lengths or [24] * len(prompts)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def many_prompts(reference: Any) -> list[list[int]]:
    """21 requests of 5 to 200 tokens, made of the reference's."""
    ids = [token for prompt in reference.prompts for token in prompt]
    lengths = [5 + 13 * i % 196 for i in range(21)]
    return [(ids[17 * i :] + ids)[:length] for i, length in enumerate(lengths)]


# --- size -------------------------------------------------------------------------------------------------------------


def test_pages_hold_eight_bits(start_engine: Callable[..., Any]) -> None:
    """Two bytes for each feature of a head and token, one of the key and one of the value; nothing is kept beside."""
    with start_engine(folder(C8), dtype="bfloat16") as llm:
        layers = attention_layers(llm)
        tokens = tokens_of_cache(llm)
        kept = {path: (layer.kv_cache.dtype, layer.kv_cache.nbytes) for path, layer in layers.items()}
        types = {path: llm.llm_engine.vllm_config.quant_config.layers[path].quant_type for path in layers}
        heads = {(layer.num_kv_heads, layer.head_size) for layer in layers.values()}
    assert heads == {(2, 32)}
    assert types == dict.fromkeys(layers, "C8")
    assert kept == dict.fromkeys(layers, (torch.int8, tokens * 2 * 2 * 32))


@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 2), ("float32", 4)])
def test_the_same_memory_holds_more_tokens(dtype: str, factor: int, start_engine: Callable[..., Any]) -> None:
    """By vLLM's own report, against the same model with a float cache."""
    found = {}
    for key in (C8, FLOAT_CACHE):
        with start_engine(folder(key), dtype=dtype) as llm:
            found[key] = tokens_of_cache(llm)
    assert found[C8] == pytest.approx(factor * found[FLOAT_CACHE], rel=1e-3)  # whole pages


def test_only_the_pages_are_read(start_engine: Callable[..., Any], reference: Any) -> None:
    """A prefix that is taken from the cache is not there once the pages are blank."""
    prefix = [token for prompt in reference.prompts for token in prompt][:128]
    tail = reference.prompts[0][:20]
    with start_engine(folder(C8), enable_prefix_caching=True, block_size=32) as llm:
        layers = attention_layers(llm)
        fresh = generate(llm, [prefix + tail])
        assert generate(llm, [prefix + tail]) == fresh
        for layer in layers.values():
            layer.kv_cache.zero_()
        assert generate(llm, [prefix + tail]) != fresh
        assert llm.reset_prefix_cache()
        assert generate(llm, [prefix + tail]) == fresh


# --- schedules --------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    "a batch": {"max_num_seqs": 21},
    "chunked prefill": {"max_num_batched_tokens": 24, "max_num_seqs": 8, "enable_chunked_prefill": True},
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32},
    # 288 tokens for all: requests are put off and begun again, in pages of any order.
    "preemption": {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 256},
}


@pytest.fixture(scope="module")
def one_by_one(start_engine: Callable[..., Any], reference: Any) -> list[list[int]]:
    """What each request gets alone in a new engine's pages."""
    with start_engine(folder(C8), max_num_seqs=1) as llm:
        return [generate(llm, [prompt])[0] for prompt in many_prompts(reference)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_tokens_of_one_by_one(
    schedule: str, start_engine: Callable[..., Any], one_by_one: list[list[int]], reference: Any
) -> None:
    """Twice: the second time pages hold what others left, and prefixes that are known."""
    prompts = many_prompts(reference)
    with start_engine(folder(C8), disable_log_stats=False, **SCHEDULES[schedule]) as llm:
        assert [generate(llm, prompts) for _ in range(2)] == [one_by_one] * 2
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    if schedule == "preemption":
        assert metrics["vllm:num_preemptions"] > 0
    if schedule == "prefix caching":
        assert metrics["vllm:prefix_cache_hits"] > 0


def test_compiled_as_eager(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """Writing and attending are calls that compiled code does not reorder."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # vLLM sets it, and would for all tests
    found = []
    try:
        for eager in (True, False):
            envs.disable_envs_cache()  # the last engine of this process froze the variables
            with start_engine(folder(C8), enforce_eager=eager) as llm:
                mode = llm.llm_engine.vllm_config.compilation_config.mode
                assert (mode == CompilationMode.NONE) == eager
                found.append(ask(llm, reference.prompts))
    finally:
        envs.disable_envs_cache()
        torch.compiler.reset()
    logprobs = [np.concatenate([one["prompt_logprobs"] for one in answers]) for answers in found]
    assert np.abs(logprobs[0] - logprobs[1]).max() < 1e-4
    assert [one["generated"] for one in found[0]] == [one["generated"] for one in found[1]]
