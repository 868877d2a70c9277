"""npu_grouped_matmul: each expert's rows as a linear layer computes them, to the last bit, and against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped_kinds import COUNTS, KINDS, E, K, N, by_linear, codes, grouped, int8, sums
from torch import Tensor

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_every_expert_is_a_linear_layer_to_the_last_bit(name: str, counts: str, stacked: bool) -> None:
    rows = COUNTS[counts]
    kind = KINDS[name](sum(rows) + 2)
    (got,) = grouped(kind, rows, stacked)
    want = torch.cat(by_linear(kind, rows))
    assert got.dtype == want.dtype
    assert torch.equal(got[: sum(rows)], want)
    assert torch.equal(got[sum(rows) :], torch.zeros(2, N, dtype=want.dtype))


@pytest.mark.parametrize("counts", COUNTS)
def test_three_kinds_of_group_lists(counts: str) -> None:
    rows = COUNTS[counts]
    kind = int8(sum(rows) + 2)
    (want,) = grouped(kind, rows)
    ends = torch.tensor(rows).cumsum(0)
    (by_ends,) = grouped(kind, rows, group_list_type=0, group_list=ends)
    assert torch.equal(by_ends, want)
    pairs = [(expert, count) for expert, count in enumerate(rows) if count] + [(0, 0)] * 2
    (by_pairs,) = grouped(kind, rows, group_list_type=2, group_list=torch.tensor(pairs))
    assert torch.equal(by_pairs, want)
    (listed,) = grouped(kind, rows, group_list_type=0, group_list=ends.tolist(), output_dtype=torch.bfloat16)
    assert torch.equal(listed, want)


def test_pairs_come_in_any_order() -> None:
    kind = sums(5)
    (got,) = grouped(kind, [], group_list_type=2, group_list=torch.tensor([[4, 2], [1, 3]]))
    assert torch.equal(got, torch.cat([kind.linear(kind.x[:2], 4, None), kind.linear(kind.x[2:], 1, None)]))


def test_against_float64() -> None:
    kind = int8(14)
    rows = [5, 0, 3, 6, 0]
    (got,) = grouped(kind, rows, output_dtype=torch.float32)
    experts = torch.arange(E).repeat_interleave(torch.tensor(rows))
    for row, expert in enumerate(experts.tolist()):
        exact = kind.x[row].double() @ kind.weight[expert].double() * kind.given["scale"][expert].double()
        assert kind.tokens is not None
        exact = exact * kind.tokens[row].double() + kind.given["bias"][expert].double()
        torch.testing.assert_close(got[row].double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["int8 weights only", "int8", "mxfp8"])
def test_rows_behind_the_last_group_do_not_matter(name: str) -> None:
    """NaN in them, or in their scales, reaches nobody: they become zero."""
    kind = KINDS[name](8)
    (want,) = grouped(kind, [3, 0, 0, 2, 0])
    if kind.x.is_floating_point():
        kind.x[5:] = float("nan")
    if kind.tokens is not None and kind.tokens.is_floating_point():
        kind.tokens[5:] = float("nan")
    (got,) = grouped(kind, [3, 0, 0, 2, 0])
    assert torch.equal(got, want)
    assert not got[5:].any()


@pytest.mark.parametrize("split_item", [0, 1, 2, 3])
def test_rows_and_results_in_lists(split_item: int) -> None:
    rows = [2, 0, 4, 1, 3]
    kind = int8(10)
    want = by_linear(kind, rows)
    if split_item in (0, 2):  # a tensor of rows for each expert
        assert kind.tokens is not None
        got = npu.npu_grouped_matmul(
            list(kind.x.split(rows)),
            kind.weight,
            per_token_scale=list(kind.tokens.split(rows)),
            split_item=split_item,
            group_type=-1,
            **kind.given,
            **kind.options,
        )
    else:
        got = grouped(kind, rows, stacked=False, split_item=split_item)
    if split_item in (0, 1):
        assert [one.shape for one in got] == [one.shape for one in want]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    else:
        assert torch.equal(got[0], torch.cat(want))


def test_experts_of_different_widths() -> None:
    x, weight = [codes(2, 8), codes(3, 16)], [codes(8, 4), codes(16, 6)]
    got = npu.npu_grouped_matmul(x, weight, group_type=-1, output_dtype=torch.int32)
    assert [torch.equal(y.long(), a.long() @ b.long()) for y, a, b in zip(got, x, weight, strict=True)] == [True] * 2


def test_floating_weights() -> None:
    x, weight, bias = torch.randn(6, K).bfloat16(), torch.randn(E, K, N).bfloat16(), torch.randn(E, N)
    counts = [1, 0, 2, 0, 2]
    (got,) = npu.npu_grouped_matmul(
        [x], [weight], bias=[bias], split_item=3, group_type=0, group_list_type=1, group_list=torch.tensor(counts)
    )
    experts = torch.arange(E).repeat_interleave(torch.tensor(counts))
    exact = torch.einsum("mk,mkn->mn", x[:5].double(), weight[experts].double()) + bias[experts]
    torch.testing.assert_close(got[:5].double(), exact, rtol=2**-7, atol=0.05)
    assert not got[5:].any()


def test_a_result_for_each_expert_is_not_compiled(compile_afresh: Callable[..., Any]) -> None:
    """How many rows they have is known when it runs."""
    kind = sums(9)

    def each(x: Tensor, counts: Tensor) -> list[Tensor]:
        found: list[Tensor] = npu.npu_grouped_matmul(
            [x],
            kind.weight,
            split_item=1,
            group_type=0,
            group_list_type=1,
            group_list=counts,
            output_dtype=torch.int32,
        )
        return [one + 1 for one in found]

    with pytest.raises(Exception, match="sizes of its results are known when it runs"):
        compile_afresh(each, backend="aot_eager")(kind.x, torch.tensor([2, 0, 4, 0, 3]))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too many rows": ({"group_list": torch.tensor([9, 0, 0, 0, 0])}, ValueError, r"\[9, 0, 0, 0, 0\] .* cut 5 rows"),
    "ends that fall": (
        {"group_list": torch.tensor([3, 2, 4, 4, 4]), "group_list_type": 0},
        ValueError,
        r"\[3, 2, 4, 4, 4\] .*type 0.* does not cut",
    ),
    "another number of experts": ({"group_list": torch.tensor([1, 2])}, ValueError, "2 entries for 5 experts"),
    "an expert that is not there": (
        {"group_list": torch.tensor([[5, 1]]), "group_list_type": 2},
        ValueError,
        "expected experts from 0 to 4",
    ),
    "another list type": ({"group_list_type": 3}, ValueError, "group_list_type 3"),
    "training": ({"group_type": 2}, NotImplementedError, "group_type 2"),
    "an activation": ({"act_type": 1}, NotImplementedError, "act_type"),
    "an offset": ({"offset": [torch.ones(N)]}, NotImplementedError, "offset"),
    "no scale": ({"scale": None}, ValueError, "needs a scale"),
    "no rule for results": ({"split_item": 0}, ValueError, "not 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_does_not_have_is_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        grouped(int8(5), [1, 1, 1, 1, 1], stacked=False, **options)


def test_a_tensor_of_rows_for_some_experts_only_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tensors x for 3 experts"):
        npu.npu_grouped_matmul([codes(1, 8)] * 2, [codes(8, 8)] * 3, group_type=-1, output_dtype=torch.int32)
