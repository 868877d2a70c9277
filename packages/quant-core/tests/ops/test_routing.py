"""Rows for the experts that tokens chose, against plain loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core import microscaling as mx

npu = torch.ops.npu

H, E = 64, 8
EVEN = torch.tensor([[0, 3], [1, 2], [2, 1], [3, 0]])
CHOICES = {
    "every expert": EVEN,
    "some experts without tokens": torch.tensor([[0, 3], [3, 7], [0, 7], [7, 3], [3, 0]]),
    "all tokens on one expert": torch.full((5, 1), 2),
    "no tokens": torch.zeros(0, 2, dtype=torch.int64),
    "many tokens": torch.arange(100).view(50, 2) * 7 % 10 - 1,
    "experts that are not here": torch.tensor([[-1, 5], [5, -1], [7, 2], [-1, -1]]),
}


def route(x: Tensor, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator as it is called of all experts, with counts."""
    given = {"expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True} | options
    result: tuple[Tensor, Tensor, Tensor, Tensor] = npu.npu_moe_init_routing_v2(x, ids.to(torch.int32), **given)
    return result


def expected(ids: Tensor, first: int, last: int) -> list[tuple[int, int]]:
    """(expert, choice) of the rows, by walking over experts, tokens and choices."""
    flat = ids.flatten().tolist()
    return [(expert, choice) for expert in range(first, last) for choice, one in enumerate(flat) if one == expert]


@pytest.mark.parametrize("here", [(0, E), (0, 3), (2, 6), (7, 8)])
@pytest.mark.parametrize("case", CHOICES)
def test_rows_indices_and_counts(case: str, here: tuple[int, int]) -> None:
    ids = CHOICES[case]
    x, rows = torch.randn(len(ids), H), expected(ids, *here)
    got, places, counts, scales = route(x, ids, active_expert_range=list(here))
    assert got.shape == (ids.numel(), H)
    assert scales.shape == (ids.numel(),)
    for row, (_, choice) in enumerate(rows):
        assert torch.equal(got[row], x[choice // ids.shape[1]])
    assert not got[len(rows) :].any()
    went = {choice: row for row, (_, choice) in enumerate(rows)}
    assert places.tolist() == [went.get(choice, -1) for choice in range(ids.numel())]
    assert counts.tolist() == [sum(expert == one for one, _ in rows) for expert in range(*here)]
    assert (places.dtype, counts.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize("case", CHOICES)
def test_three_ways_to_tell_the_rows_of_each_expert(case: str) -> None:
    ids, here = CHOICES[case], (1, 4)
    x = torch.randn(len(ids), H)
    ends, counts, pairs = (
        route(x, ids, active_expert_range=list(here), expert_tokens_num_type=kind)[2].tolist() for kind in range(3)
    )
    assert ends == torch.tensor(counts).cumsum(0).tolist()
    some = [[here[0] + index, count] for index, count in enumerate(counts) if count]
    assert pairs == some + [[0, 0]] * (E - len(some))
    assert route(x, ids, expert_tokens_num_flag=False)[2].shape == ()


def test_the_other_index_says_which_choice_each_row_is() -> None:
    ids = CHOICES["some experts without tokens"]
    x = torch.randn(len(ids), H)
    rows, which, _, _ = route(x, ids, row_idx_type=1)
    assert torch.equal(rows, x[which // ids.shape[1]])
    assert which.tolist() == [choice for _, choice in expected(ids, 0, E)]


@pytest.mark.parametrize("active", [0, 3, 100])
def test_fewer_rows_on_request(active: int) -> None:
    ids = EVEN
    x = torch.randn(len(ids), H)
    all_rows, places, counts, _ = route(x, ids)
    rows, same_places, same_counts, _ = route(x, ids, active_num=active)
    assert torch.equal(rows, all_rows[: active or len(all_rows)])
    assert torch.equal(places, same_places)
    assert torch.equal(counts, same_counts)


def test_without_a_number_of_experts_all_are_here_but_minus_one() -> None:
    ids = torch.tensor([[900, -1], [4, 900]])
    x = torch.randn(2, H)
    rows, places, _, _ = npu.npu_moe_init_routing_v2(x, ids)
    assert places.tolist() == [1, -1, 0, 2]
    assert torch.equal(rows[:3], x[[1, 0, 1]])
    assert not rows[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", ["none", "one", "each expert's"])
def test_dynamic_quantisation(dtype: torch.dtype, smooth: str) -> None:
    """Of a row, the same as npu_dynamic_quant makes of it; not of a token that is multiplied afterwards."""
    ids, here = CHOICES["experts that are not here"], [1, 6]
    x = torch.randn(len(ids), H).to(dtype)
    scale = {"none": None, "one": torch.rand(1, H), "each expert's": torch.rand(5, H)}[smooth]
    plain, _, counts, _ = route(x, ids, active_expert_range=here)
    codes, _, _, scales = route(x, ids, active_expert_range=here, quant_mode=1, scale=scale)
    factors = torch.ones(len(plain), H)
    if scale is not None:
        experts = torch.arange(5).repeat_interleave(counts)
        factors[: len(experts)] = scale[experts] if len(scale) > 1 else scale
    want, want_scales = npu.npu_dynamic_quant(plain.float() * factors)
    assert torch.equal(codes, want)
    assert torch.equal(scales, want_scales)


def test_static_quantisation_is_computed_in_float16() -> None:
    x, ids = torch.randn(len(EVEN), H) * 50, EVEN
    codes, _, _, nothing = route(x, ids, quant_mode=0, scale=torch.tensor([1.3]), offset=torch.tensor([3.4]))
    rows = route(x, ids)[0].to(torch.float16)
    want = (rows * torch.tensor(1.3).half() + torch.tensor(3.4).half()).double().round().clamp(-128, 127)
    assert torch.equal(codes.double(), want)
    assert nothing.shape == ()


@pytest.mark.parametrize(("mode", "dtype"), [(2, torch.float8_e5m2), (3, torch.float8_e4m3fn), (9, 296)])
@pytest.mark.parametrize("width", [64, 80])
def test_microscaled_rows(mode: int, dtype: Any, width: int) -> None:
    ids = CHOICES["experts that are not here"]
    x = torch.randn(len(ids), width)
    codes, places, _, exponents = route(x, ids, active_expert_range=[1, 6], quant_mode=mode)
    want, want_exponents = npu.npu_dynamic_mx_quant(x, dst_type=dtype)
    assert exponents.dtype == torch.float8_e8m0fnu
    for choice, row in enumerate(places.tolist()):
        if row >= 0:
            assert torch.equal(codes[row].view(torch.uint8), want[choice // 2].view(torch.uint8))
            assert torch.equal(exponents[row].view(torch.uint8).flatten(), want_exponents[choice // 2].flatten())
    assert exponents.numel() == len(codes) * 2 * -(-mx.blocks_of(width) // 2)


def test_scales_of_tokens_that_are_quantised_already_go_along() -> None:
    ids = CHOICES["experts that are not here"]
    x, scale = torch.randint(-128, 128, (len(ids), H), dtype=torch.int8), torch.rand(len(ids))
    codes, places, _, scales = route(x, ids, scale=scale, active_expert_range=[1, 6])
    for choice, row in enumerate(places.tolist()):
        assert row < 0 or (torch.equal(codes[row], x[choice // 2]) and scales[row] == scale[choice // 2])
    assert not scales[int((places >= 0).sum()) :].any()


@pytest.mark.parametrize("mode", [-1, 1, 3])
def test_a_token_of_nobody_reaches_no_row(mode: int) -> None:
    ids = torch.tensor([[-1, 7], [0, 1], [7, 7]])
    x = torch.randn(3, H)
    x[[0, 2]] = float("nan")
    rows, _, counts, scales = route(x, ids, active_expert_range=[0, 4], quant_mode=mode)
    assert counts.sum() == 2
    assert rows.float().isfinite().all()
    assert scales.float().isfinite().all()


@pytest.mark.parametrize("count", [None, 0, 3, 50, -2])
@pytest.mark.parametrize("case", ["every expert", "some experts without tokens", "no tokens"])
def test_permute(case: str, count: int | None) -> None:
    ids = CHOICES[case]
    tokens = torch.randn(len(ids), H)
    rows = [tokens[choice // ids.shape[1]] for _, choice in expected(ids, 0, E)]
    if count == -2 and not rows:
        return
    got, places = npu.npu_moe_token_permute(tokens, ids, count)
    want = rows[:count] if count else rows
    assert torch.equal(got, torch.stack(want) if want else tokens)
    went = {choice: row for row, (_, choice) in enumerate(expected(ids, 0, E))}
    assert places.tolist() == [went[choice] for choice in range(ids.numel())]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"drop_pad_mode": 1}, NotImplementedError, "drop_pad_mode 1"),
        ({"quant_mode": 13}, NotImplementedError, "quant_mode 13"),
        ({"active_expert_range": [3, 3]}, ValueError, r"\[3, 3\] has no expert"),
        ({"expert_num": -1}, ValueError, "expert_num"),
        ({"expert_tokens_num_type": 5}, ValueError, "expert_tokens_num_type is 5"),
        ({"quant_mode": 0}, ValueError, "scale and offset"),
        ({"quant_mode": 1, "scale": torch.ones(3, H)}, ValueError, r"\[3, 64\], expected \[1, 64\]"),
    ],
)
def test_what_the_kernel_does_not_have_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        route(torch.randn(4, H), EVEN, **options)
    with pytest.raises(ValueError, match=r"\[3, 64\] and expert_idx \[4, 2\]"):
        route(torch.randn(3, H), EVEN)
