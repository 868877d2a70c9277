"""Attention of every kind over quantised caches: as vLLM's own attention over keys and values that were rounded."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_core import LimitError, QuantError
from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import arithmetic
from caching import Stored, attention_layers, calibrated, put_caches, ranges, rounding
from survey_table import TABLE
from versions import lacking

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

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


def stored_at(place: str, caches: dict[str, Stored]) -> dict[str, Stored]:
    """The same under the names of attention modules in a checkpoint."""
    return {place.format(number(layer)): cache for layer, cache in caches.items()}


@pytest.fixture(autouse=True)
def inspect_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at each model class in a new process first, ten seconds each, lest CUDA be initialised."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


@pytest.mark.parametrize(("kind", "symmetric"), [*((kind, False) for kind in KINDS), ("grouped heads", True)])
def test_as_attention_over_rounded_keys_and_values(
    kind: str, symmetric: bool, tmp_path: Path, start_engine: Callable[..., Any]
) -> None:
    """And not as attention without what is special, nor as without rounding."""
    name, changes, place, special = KINDS[kind]
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
    stored = stored_at(place, caches)
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


@pytest.mark.parametrize("quantised", ["0", "1"])
@pytest.mark.parametrize("kind", ["grouped heads", "windows in some layers"])
def test_a_float_cache_in_one_layer_of_two(
    kind: str, quantised: str, tmp_path: Path, start_engine: Callable[..., Any]
) -> None:
    """Layers without scales keep float pages beside those of 8 bits."""
    name, changes, place, _ = KINDS[kind]
    folder = plain(name, changes, tmp_path)
    with start_engine(folder, **ENGINE) as llm:
        with ranges() as found:
            exact = arithmetic.vllm_logprobs(llm, prompts())
        caches = {layer: calibrated(of) for layer, of in found.items() if number(layer) == quantised}
        with rounding(caches):
            expected = arithmetic.vllm_logprobs(llm, prompts())
    with start_engine(put_caches(folder, tmp_path / "quantised", stored_at(place, caches)), **ENGINE) as llm:
        dtypes = {number(path): layer.kv_cache.dtype for path, layer in attention_layers(llm).items()}
        answers = arithmetic.vllm_logprobs(llm, prompts())
    assert dtypes == {"0": torch.float32, "1": torch.float32} | {quantised: torch.int8}
    median, _ = arithmetic.differences(answers, expected)
    assert median < 2e-4
    assert arithmetic.differences(exact, expected)[0] > 20 * median


# --- layers that share a cache ----------------------------------------------------------------------------------------

#: Layers 2 and 3 read what 0 and 1 wrote.
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
PLACE = "model.layers.{}.self_attn"


@pytest.mark.parametrize("own", [False, True], ids=["without scales", "with scales of their own"])
def test_layers_that_read_the_cache_of_others(own: bool, tmp_path: Path, start_engine: Callable[..., Any]) -> None:
    """By the scales of the layers that write; their own, which calibration may have found, mean nothing."""
    folder = plain("gemma3n_text", SHARING, tmp_path)
    with start_engine(folder, **ENGINE) as llm:
        with ranges() as found:
            exact = arithmetic.vllm_logprobs(llm, prompts())
        caches = {layer: calibrated(of) for layer, of in found.items()}
        assert {number(layer) for layer in caches} == {"0", "1"}
        with rounding(caches):
            expected = arithmetic.vllm_logprobs(llm, prompts())
    stored = stored_at(PLACE, caches)
    if own:
        for reader, writer in ((2, 0), (3, 1)):
            cache = stored[PLACE.format(writer)]
            stored[PLACE.format(reader)] = {n: v * 2 if n.endswith("scale") else v.clone() for n, v in cache.items()}
    with start_engine(put_caches(folder, tmp_path / "quantised", stored), **ENGINE) as llm:
        answers = arithmetic.vllm_logprobs(llm, prompts())
    median, _ = arithmetic.differences(answers, expected)
    assert median < 2e-4
    assert arithmetic.differences(exact, expected)[0] > 20 * median


def test_a_layer_that_reads_a_float_cache_and_has_scales(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """One layer of two that share: nothing says how the other writes."""
    folder = plain("gemma3n_text", SHARING, tmp_path)
    one = {name: torch.ones(2, 32) for name in ("k_scale", "v_scale")}
    broken = put_caches(folder, tmp_path / "quantised", {PLACE.format(2): one})
    with (
        pytest.raises(QuantError, match=r"model\.layers\.2\.self_attn.*shares the cache of") as raised,
        load_model(broken, max_model_len=128, skip_tokenizer_init=True),
    ):
        pass
    assert "model.layers.2.self_attn.k_proj.kv_cache_scale" in str(raised.value)


# --- what contradicts a quantised cache -------------------------------------------------------------------------------

C8 = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8C8_ASYM"


@pytest.mark.parametrize("given", [["0"], ["sliding_window"]])
def test_layers_to_be_skipped(given: list[str], load_model: Callable[..., Any]) -> None:
    with (
        pytest.raises(LimitError, match=r"--kv-cache-dtype-skip-layers (0|sliding_window) cannot be had"),
        load_model(C8, kv_cache_dtype_skip_layers=given),
    ):
        pass


@pytest.mark.parametrize("given", ["fp8", "fp8_e5m2", "bfloat16", "float16"])
def test_another_dtype_for_the_cache(given: str, configure: Callable[..., Any]) -> None:
    with pytest.raises(LimitError, match=f"--kv-cache-dtype {given} contradicts the checkpoint, whose cache is C8"):
        configure(C8, kv_cache_dtype=given)


@pytest.mark.skipif(bool(lacking("steps causal in part")), reason=lacking("steps causal in part"))
def test_steps_that_are_causal_for_some_requests() -> None:
    """Which no model here makes: diffusion models do."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    from vllm_ascend_quant.methods.paged_attention import AscendCPUAttentionImpl

    ints = torch.zeros(1, dtype=torch.int32)
    metadata = CPUAttentionMetadata(1, 1, ints, 1, ints, ints[:, None], ints, None, dynamic_causal=ints)
    impl = object.__new__(AscendCPUAttentionImpl)
    empty = torch.empty(0)
    with pytest.raises(LimitError, match="all causal or all not"):
        impl.forward(None, empty, empty, empty, empty, metadata, empty)
