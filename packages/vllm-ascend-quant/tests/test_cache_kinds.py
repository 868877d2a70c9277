"""Attention of every kind over quantised caches: as vLLM's own attention over keys and values that were rounded."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import arithmetic
from caching import attention_layers, calibrated, put_caches, ranges, rounding, tokens_of_cache
from survey_table import TABLE
from versions import lacking

ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, "block_size": 32}

#: For each kind: the architecture, what its config gets, where attention stands in a checkpoint, and what of vLLM's
#: attention is special, which without it would answer otherwise.
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "grouped heads": ("qwen3", {}, "model.layers.{}.self_attn", {}),
    "one head for all": ("llama", {"num_key_value_heads": 1}, "model.layers.{}.self_attn", {}),
    "a window": ("mistral", {"sliding_window": 7}, "model.layers.{}.self_attn", {"sliding_window": -1}),
    "windows in some layers": (
        "cohere2",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
        "model.layers.{}.self_attn",
        {"sliding_window": -1},
    ),
    "softcap and windows": (
        "gemma2",
        {"sliding_window": 7, "attn_logit_softcapping": 2.0},
        "model.layers.{}.self_attn",
        {"logits_soft_cap": 0.0},
    ),
    "sinks and windows": ("gpt_oss", {"sliding_window": 7}, "model.layers.{}.self_attn", {"sinks": None}),
    "alibi": ("bloom", {}, "transformer.h.{}.self_attention", {"alibi_slopes": None}),
}


def plain(name: str, changes: dict[str, Any], folder: Path) -> Path:
    """A tiny model as a ModelSlim folder that quantises nothing yet: what is quantised elsewhere only adds noise."""
    architecture = dataclasses.replace(TABLE[name], config={**TABLE[name].config, **changes})
    architectures.build(architecture).save_pretrained(folder / "float")
    tensors = {}
    for file in (folder / "float").glob("*.safetensors"):
        tensors |= load_file(file)
    write_checkpoint(folder / "plain", tensors, lambda *_: "FLOAT", files_from=folder / "float")
    return folder / "plain"


def prompts() -> list[list[int]]:
    """Longer than windows and pages."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(10, 500, (length,), generator=generator).tolist() for length in (70, 9, 33)]


def number(layer_name: str) -> str:
    """The number of the block that a layer stands in."""
    found = re.search(r"\.(\d+)\.", layer_name)
    assert found
    return found[1]


@pytest.fixture(autouse=True)
def inspect_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at each model class in a new process first, ten seconds each, lest CUDA be initialised."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


@pytest.mark.parametrize("symmetric", [False, True], ids=["offsets", "symmetric"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_attention_over_rounded_keys_and_values(
    kind: str, symmetric: bool, tmp_path: Path, start_engine: Callable[..., Any]
) -> None:
    """And not as attention without what is special, nor as without rounding."""
    name, changes, place, special = KINDS[kind]
    if symmetric and kind != "grouped heads":
        pytest.skip("once is enough")
    if kind == "sinks and windows" and (reason := lacking("sinks in float32")):
        pytest.skip(reason)
    settings = {**ENGINE, **TABLE[name].engine}
    folder = plain(name, changes, tmp_path)
    with start_engine(folder, **settings) as llm:
        with ranges() as found:
            exact = arithmetic.vllm_logprobs(llm, prompts())
        caches = {layer: calibrated(of, symmetric=symmetric) for layer, of in found.items()}
        with rounding(caches):
            expected = arithmetic.vllm_logprobs(llm, prompts())
    stored = {
        place.format(number(layer)): {n: v for n, v in cache.items() if not (symmetric and n.endswith("offset"))}
        for layer, cache in caches.items()
    }
    with start_engine(put_caches(folder, tmp_path / "quantised", stored), **settings) as llm:
        layers = attention_layers(llm)
        assert {layer.kv_cache.dtype for layer in layers.values()} == {torch.int8}
        answers = arithmetic.vllm_logprobs(llm, prompts())
        for layer in layers.values():
            vars(layer.impl).update(special)
        without = arithmetic.vllm_logprobs(llm, prompts())
    median, _ = arithmetic.differences(answers, expected)
    assert median < 2e-4  # of 1e-6, where noise lets no value go to the code beside
    assert arithmetic.differences(exact, expected)[0] > 100 * median
    assert not special or arithmetic.differences(without, expected)[0] > 1000 * median
