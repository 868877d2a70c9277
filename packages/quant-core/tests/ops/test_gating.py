"""Choosing experts, against plain loops in float64."""

import math

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu

TOKENS, E = 7, 12


def distinct(*shape: int) -> Tensor:
    """Logits far enough from each other that no rounding changes their order."""
    return torch.stack([torch.randperm(shape[-1]) for _ in range(math.prod(shape[:-1]))]).view(shape) / 4.0


@pytest.mark.parametrize("shape", [(TOKENS, E), (2, 3, E), (0, E)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (distinct(*shape) if 0 not in shape else torch.zeros(shape)).to(dtype)
    weights, ids, numbers = npu.npu_moe_gating_top_k_softmax(x, None, 3)
    exact = x.double().softmax(dim=-1).topk(3, dim=-1)
    assert torch.equal(ids.long(), exact.indices)
    torch.testing.assert_close(weights.double(), exact.values, rtol=torch.finfo(dtype).eps, atol=1e-7)
    tokens = math.prod(shape[:-1])
    assert numbers.view(-1, 3).tolist() == [[choice * tokens + token for choice in range(3)] for token in range(tokens)]
    assert (weights.dtype, ids.dtype, numbers.dtype) == (dtype, torch.int32, torch.int32)


def test_of_equals_the_first_is_chosen_and_who_is_finished_chooses_none() -> None:
    x, finished = torch.zeros(2, E), torch.tensor([False, True])
    _, ids, _ = npu.npu_moe_gating_top_k_softmax(x, finished, 2)
    assert ids.tolist() == [[0, 1], [E, E]]


def chosen(scores: Tensor, bias: Tensor, k: int, k_group: int, group_count: int, two: bool) -> list[int]:
    """The experts of one token, by sorting lists."""
    ranked = [(score + b, -index) for index, (score, b) in enumerate(zip(scores.tolist(), bias.tolist(), strict=True))]
    size = E // group_count
    groups = [ranked[group * size : (group + 1) * size] for group in range(group_count)]
    worth = [sum(score for score, _ in sorted(group)[-2:]) if two else max(group)[0] for group in groups]
    best = sorted(range(group_count), key=lambda group: -worth[group])[:k_group]
    candidates = [pair for group in best for pair in groups[group]]
    return [-index for _, index in sorted(candidates, reverse=True)[:k]]


@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("k_group", "group_count", "mode"), [(1, 1, 0), (2, 4, 0), (2, 4, 1), (3, 6, 1)])
def test_in_groups(norm_type: int, with_bias: bool, k_group: int, group_count: int, mode: int) -> None:
    x, bias = distinct(TOKENS, E), torch.randn(E) if with_bias else torch.zeros(E)
    weights, ids, scores = npu.npu_moe_gating_top_k(
        x,
        3,
        bias=bias if with_bias else None,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=mode,
        norm_type=norm_type,
        out_flag=True,
        routed_scaling_factor=2.5,
    )
    exact = x.double().sigmoid() if norm_type else x.double().softmax(dim=-1)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-7)
    for token in range(TOKENS):
        want = chosen(exact[token], bias.double(), 3, k_group, group_count, mode == 1)
        assert ids[token].tolist() == want
        of_experts = exact[token, want]
        of_experts = of_experts / of_experts.sum() if norm_type else of_experts
        torch.testing.assert_close(weights[token].double(), 2.5 * of_experts, rtol=1e-6, atol=1e-7)


def test_scores_are_returned_on_request_only() -> None:
    assert not npu.npu_moe_gating_top_k(distinct(TOKENS, E), 2)[2].any()


def test_what_the_kernel_does_not_have_is_refused() -> None:
    x = distinct(TOKENS, E)
    with pytest.raises(NotImplementedError, match="renorm=1"):
        npu.npu_moe_gating_top_k(x, 2, renorm=1)
    with pytest.raises(ValueError, match="12 experts do not give 4 in 1 of 4 groups"):
        npu.npu_moe_gating_top_k(x, 4, k_group=1, group_count=4)
