"""Several ranks in real processes, judged by the numbers of one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import ranks

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

# One after the other: an engine of several processes keeps both cores of a small machine busy.
pytestmark = pytest.mark.xdist_group("engines of several processes")
QWEN3 = "msmodelslim/qwen3"
EXACT_TP = {"additional_config": {"ascend_quant": {"exact_tp": True}}}


def logprobs(answers: list[dict[str, Any]]) -> Any:
    """Those of all prompts, in one array."""
    return np.concatenate([one["prompt_logprobs"] for one in answers])


def deviation(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The median difference of the prompts' log-probabilities: noise of 1e-7 flips a rounding here and there."""
    return float(np.median(np.abs(logprobs(found) - logprobs(expected))))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("W8A8", {"tensor_parallel_size": 2}, marks=pytest.mark.extended),
        pytest.param("W8A16_GROUP64", {"tensor_parallel_size": 2}, marks=pytest.mark.extended),
        ("W8A8_DYNAMIC_SHARDED", {"tensor_parallel_size": 2, **EXACT_TP}),
        # Eager mode does not know pipelines on CPU, for any model.
        ("W8A8_DYNAMIC_SHARDED", {"pipeline_parallel_size": 2, "enforce_eager": False}),
        pytest.param("W8A8C8_ASYM", {"pipeline_parallel_size": 2, "enforce_eager": False}, marks=pytest.mark.extended),
    ],
)
def test_two_ranks_answer_like_one(name: str, options: dict[str, Any], reference: Any) -> None:
    """Static and weight-only types always, dynamic ones with exact TP: the reference knows no ranks."""
    key = f"{QWEN3}/{name}"
    answers = ranks.Engine(DATA / "checkpoints" / key, reference.prompts, **options).answers()
    verdict = reference.judge(key, answers, "float32")
    assert verdict["ok"], verdict["why"]


def quantise_each_half(_: Any, layer: nn.Module, x: Tensor, bias: Tensor | None, tp_rank: int) -> Tensor:
    """A row-parallel W8A8_DYNAMIC layer of two ranks, by its definition: each quantises its half of a token."""
    assert bias is None
    assert tp_rank == 0
    total = torch.zeros(*x.shape[:-1], layer.weight.shape[1], dtype=torch.float64)
    for half, weight in zip(x.double().chunk(2, -1), layer.weight.double().chunk(2, 0), strict=True):
        scale = half.abs().amax(-1, keepdim=True) / 127
        total += (half / scale).round().nan_to_num(0).clamp(-128, 127) @ weight * scale
    return (total * layer.weight_scale.double()).to(x.dtype)


def test_a_dynamic_type_quantises_each_ranks_slice(
    start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """Without exact TP two ranks compute what the definition says of slices, which is not what one rank computes."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    folder, prompts = DATA / "checkpoints" / QWEN3 / "W8A8_DYNAMIC_SHARDED", reference.prompts
    found = ranks.Engine(folder, prompts, tensor_parallel_size=2).answers()
    with start_engine(folder) as llm:
        one_rank = ask(llm, prompts)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        rows = [m for m in model.modules() if isinstance(m, RowParallelLinear)]
        assert len(rows) == 2 * 3
        for layer in rows:
            scheme = layer.quant_method.quant_method
            scheme.apply = MethodType(quantise_each_half, scheme)
        slices = ask(llm, prompts)
    moved = np.abs(logprobs(slices) - logprobs(one_rank)) > 1e-3
    assert moved.sum() > 20
    assert np.median(np.abs(logprobs(found) - logprobs(slices))[moved]) < 1e-5


@pytest.mark.parametrize(
    ("quant_type", "options"),
    [pytest.param("W8A16", {}, marks=pytest.mark.extended), ("W8A8_DYNAMIC", EXACT_TP)],
)
def test_ranks_that_share_a_key_value_head(
    quant_type: str, options: dict[str, Any], tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """One key/value head on two ranks: both hold it."""
    qwen3 = architectures.Architecture("qwen3", "Qwen3ForCausalLM", {"num_key_value_heads": 1})
    model = architectures.build(qwen3)
    model.save_pretrained(tmp_path / "float")
    write_checkpoint(
        tmp_path / "quant",
        model.state_dict(),
        lambda module, _: quant_type if "layers" in module else "FLOAT",
        files_from=tmp_path / "float",
    )
    prompts = [[1, *range(20, 60)], [1, *range(300, 320)]]
    settings = {"skip_tokenizer_init": True, "max_model_len": 128, **options}
    found = ranks.Engine(tmp_path / "quant", prompts, tensor_parallel_size=2, **settings).answers()
    with start_engine(tmp_path / "quant", **settings) as llm:
        expected = ask(llm, prompts)
    assert deviation(found, expected) < 1e-5
    assert [one["generated"] for one in found] == [one["generated"] for one in expected]


def test_a_parallel_size_that_cuts_a_group() -> None:
    """Groups of 64 of 128 input features cannot be cut over four ranks: the error says what can be done."""
    folder = DATA / "checkpoints" / QWEN3 / "W8A16_GROUP64"
    printed = ranks.Engine(folder, [[1, 2]], core_apart=True, tensor_parallel_size=4).output()
    # The front process's own words come last: not that its engine did not start, but what a worker raised.
    last = printed.rpartition("Traceback (most recent call last):")[2]
    assert "LimitError: model.layers.0.self_attn.o_proj: weight_scale cannot be cut over 4 tensor-parallel" in last
    assert "found: 128 input features" in last
    assert "multiples of 64" in last
    assert "use tensor_parallel_size 2 (1 would fit as well)" in last
    assert "Engine core initialization failed" not in last


def test_data_parallel_engines(reference: Any) -> None:
    """Each is a whole engine and needs nothing of us: both answer like one."""
    key, prompts = f"{QWEN3}/W8A8", reference.prompts
    answers = ranks.Engine(DATA / "checkpoints" / key, prompts, data_parallel_size=2).answers()
    assert len(answers) == 2 * len(prompts)
    first, second = answers[: len(prompts)], answers[len(prompts) :]
    assert first == second
    verdict = reference.judge(key, first, "float32")
    assert verdict["ok"], verdict["why"]
