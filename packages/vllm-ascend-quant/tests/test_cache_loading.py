"""Scales of quantised caches that change, come late, or are saved: always the numbers of a fresh start."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import LoadError

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from caching import attention_layers

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

C8 = "msmodelslim/qwen3/W8A8C8_ASYM"
WEIGHTS = "quant_model_weights.safetensors"
SCALE = "model.layers.1.self_attn.v_proj.kv_cache_scale"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def with_other_scales(folder: Path) -> Path:
    """Coarser caches, whose offsets are others as well."""
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if name.endswith("kv_cache_scale"):
            tensors[name] = tensor * 3
        elif name.endswith("kv_cache_offset"):
            tensors[name] = (tensor / 3).round()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def other(checkpoint: Callable[[str], Path]) -> Path:
    return with_other_scales(checkpoint(C8))


@pytest.mark.parametrize("cached", [False, True], ids=["no prefix caching", "prefix caching"])
def test_reloads(
    cached: bool, other: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """First scales, others, the first again: each time what a fresh engine answers, also beside codes in the cache."""
    first, prompts = DATA / "checkpoints" / C8, reference.prompts[:4]
    # Prompts' log-probabilities are never taken from a prefix cache: answers to what follows a long prefix are.
    prefix = [token for prompt in reference.prompts for token in prompt][:96]
    options = {"enable_prefix_caching": cached, "block_size": 32}

    def answers(llm: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prefix + ids} for ids in prompts]
        outputs = [output.outputs[0] for output in llm.generate(given, sampling, use_tqdm=False)]
        chosen = [[at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
        return [[list(output.token_ids) for output in outputs], [[round(x, 3) for x in one] for one in chosen]]

    fresh = {}
    for folder in (other, first):
        with start_engine(folder, **options) as llm:
            fresh[folder] = answers(llm)
            if folder == first:
                assert answers(llm) == fresh[first]
                for reloaded in (other, first):
                    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(reloaded)})
                    assert answers(llm) == fresh[reloaded]
    assert fresh[other] != fresh[first]


def test_made_up_weights_and_real_ones_after_them(
    other: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    first, prompts = DATA / "checkpoints" / C8, reference.prompts[:4]
    fresh = {}
    for folder in (first, other):
        with start_engine(folder) as llm:
            fresh[folder] = ask(llm, prompts)
    with start_engine(first, load_format="dummy") as llm:
        made_up = ask(llm, prompts)
        assert all(layer.kv_cache.dtype.itemsize == 1 for layer in attention_layers(llm).values())
        for folder in (other, first):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors_of(folder).items())})
            assert ask(llm, prompts) == fresh[folder]
    assert made_up not in fresh.values()
    assert fresh[first] != fresh[other]


def test_a_reload_that_lacks_a_scale(start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any) -> None:
    """Refused by the checkpoint's name of the tensor, and the next reload is judged by itself."""
    first, prompts = DATA / "checkpoints" / C8, reference.prompts[:2]
    tensors = tensors_of(first)
    with start_engine(first) as llm:
        fresh = ask(llm, prompts)
        sent = iter((name, tensor) for name, tensor in tensors.items() if name != SCALE)
        with pytest.raises(LoadError, match=rf"never loaded: {SCALE}"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        assert ask(llm, prompts) == fresh


def test_a_saved_state(
    other: Path,
    tmp_path: Path,
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """Saved by vLLM's own function, started from nothing else, and reloaded from a checkpoint's stream."""
    first, target, prompts = DATA / "checkpoints" / C8, tmp_path / "state", reference.prompts[:4]
    target.mkdir()
    with start_engine(other) as llm:
        fresh_other = ask(llm, prompts)
    with start_engine(first) as llm:
        fresh = ask(llm, prompts)
        llm.llm_engine.engine_core.save_sharded_state(str(target))
        assert ask(llm, prompts) == fresh
    assert fresh != fresh_other
    with start_engine(target, load_format="sharded_state") as llm:
        assert ask(llm, prompts) == fresh
        for folder, expected in ((other, fresh_other), (first, fresh)):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors_of(folder).items())})
            assert ask(llm, prompts) == expected


def test_a_saved_state_that_is_damaged(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """A scale of another length, or of a layer that is not there."""
    from vllm.model_executor.model_loader import ShardedStateLoader

    target = tmp_path / "state"
    target.mkdir()
    with load_model(DATA / "checkpoints" / C8) as model:
        ShardedStateLoader.save_model(model, str(target))
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    (name,) = [name for name in tensors if "layers.1." in name and name.endswith(".quantised_cache.v_scale")]
    save_file({**tensors, name: tensors[name][:1].clone()}, file)
    with (
        pytest.raises(LoadError, match=rf"the saved {name} does not fit"),
        load_model(target, load_format="sharded_state"),
    ):
        pass
