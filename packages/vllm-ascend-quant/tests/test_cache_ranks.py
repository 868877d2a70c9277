"""Quantised caches on several ranks: each takes its heads' part of the scales."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quant_core import LayerQuant, LoadError, StoredForm, StoredTensor, WeightForm
from vllm_ascend_quant.placement import deciding_caches

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import ranks
from caching import put_caches
from test_cache_kinds import plain

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

C8 = "msmodelslim/qwen3/W8A8C8_ASYM"


@pytest.mark.xdist_group("engines of several processes")
def test_two_ranks_answer_like_one(reference: Any) -> None:
    """Scales of channels; llm-compressor's, of heads and of tensors, are among its own tests."""
    answers = ranks.Engine(DATA / "checkpoints" / C8, reference.prompts, tensor_parallel_size=2).answers()
    verdict = reference.judge(C8, answers, "float32")
    assert verdict["ok"], verdict["why"]


@pytest.mark.extended
@pytest.mark.xdist_group("engines of several processes")
def test_ranks_that_share_heads(tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]) -> None:
    """Two key/value heads on four ranks, whose channels differ widely: another head's scales would show."""
    torch.manual_seed(3)
    shapes = {"k_scale": 0.02, "v_scale": 0.02}
    caches = {
        f"model.layers.{layer}.self_attn": {
            **{name: torch.rand(2, 32) * high + 0.005 for name, high in shapes.items()},
            **{name: torch.randint(-9, 9, (2, 32)).float() for name in ("k_offset", "v_offset")},
        }
        for layer in range(2)
    }
    folder = put_caches(plain("qwen3", {}, tmp_path), tmp_path / "quantised", caches)
    prompts = [[1, *range(20, 60)], [1, *range(300, 320)]]
    settings = {"skip_tokenizer_init": True, "max_model_len": 128}
    found = ranks.Engine(folder, prompts, tensor_parallel_size=4, **settings).answers()
    with start_engine(folder, **settings) as llm:
        expected = ask(llm, prompts)
    one, other = (np.concatenate([prompt["prompt_logprobs"] for prompt in side]) for side in (found, expected))
    assert np.median(np.abs(one - other)) < 2e-4
    assert [prompt["generated"] for prompt in found] == [prompt["generated"] for prompt in expected]
    swapped = {module: {name: value.flip(0) for name, value in cache.items()} for module, cache in caches.items()}
    with start_engine(put_caches(tmp_path / "plain", tmp_path / "swapped", swapped), **settings) as llm:
        wrong = np.concatenate([prompt["prompt_logprobs"] for prompt in ask(llm, prompts)])
    assert np.median(np.abs(wrong - other)) > 1e-2


# --- which heads ------------------------------------------------------------------------------------------------------


def first_heads(
    monkeypatch: pytest.MonkeyPatch, total: int, on_ranks: int, strategy: str, told: int | None = None
) -> list[tuple[int, int, int]]:
    """For each rank: the key/value heads of the model, the first on this rank, and how many it has."""
    local, head_size = max(1, total // on_ranks), 8
    layer = SimpleNamespace(num_heads=4, num_kv_heads=local, head_size=head_size, head_size_v=head_size)
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=on_ranks))
    shape = {"channel": (total * head_size,), "head": (total, 1, 1), "tensor": (1,)}[strategy]
    scale = StoredTensor("attn.k_scale", shape, torch.float32, "file")
    form = StoredForm("attn", {"k_scale": scale}, weight=WeightForm(strategy=strategy))  # type: ignore[arg-type]
    found = []
    for rank in range(on_ranks):
        monkeypatch.setattr(deciding_caches, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        sizes = deciding_caches._sizes(layer, LayerQuant("C8", ("attn",), (form,)), config, told)
        assert sizes.local_heads == (4, local)
        assert sizes.num_heads == 4 * on_ranks
        found.append((sizes.num_kv_heads, sizes.first_kv_head, sizes.local_heads[1]))
    return found


@pytest.mark.parametrize("strategy", ["channel", "head"])
@pytest.mark.parametrize(
    ("total", "on_ranks", "firsts"),
    [
        (4, 1, [0]),
        (4, 2, [0, 2]),
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [0, 0, 1, 1]),
        (1, 4, [0, 0, 0, 0]),
        (2, 8, [0, 0, 0, 0, 1, 1, 1, 1]),
        (8, 4, [0, 2, 4, 6]),
    ],
)
def test_heads_of_each_rank(
    total: int, on_ranks: int, firsts: list[int], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's qkv layer gives them to ranks: neighbours share a head that there are too few of."""
    for told in (None, total):
        found = first_heads(monkeypatch, total, on_ranks, strategy, told)
        assert found == [(total, first, max(1, total // on_ranks)) for first in firsts]


@pytest.mark.parametrize("told", [None, 2])
@pytest.mark.parametrize("on_ranks", [1, 2, 4])
def test_one_scale_for_all_is_every_ranks(on_ranks: int, told: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many heads the model has is not told by it, and does not matter: no rank reaches beyond them."""
    for heads, first, local in first_heads(monkeypatch, 2, on_ranks, "tensor", told):
        assert first + local <= heads


def test_scales_of_fewer_heads_than_there_are(
    checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """On one rank nothing is shared: half as many scales are no replicated heads, but too few."""
    from safetensors.torch import load_file, save_file

    folder = checkpoint(C8)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if "layers.1." in name and "kv_cache" in name:
            tensors[name] = tensors[name][:32].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    expected = r"(?s)layers\.1\.self_attn\.k_proj\.kv_cache_scale in .* is \[32\].*expected: 64 values, per channel"
    with pytest.raises(LoadError, match=expected), load_model(folder):
        pass
