"""Weighted sums of what the experts returned, against plain loops in float64."""

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu

H, E = 40, 5
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (0, 1, 31, 32, 33, 70)  # sums are made by 32 tokens


def check(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings in float32 and one to the dtype."""
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-5)


def places_of(tokens: int, k: int) -> Tensor:
    """Where the rows of all choices are, some of them nowhere."""
    places = torch.randperm(tokens * k, dtype=torch.int32)
    places[::7] = -1
    return places


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("tokens", TOKENS)
def test_unpermute(tokens: int, k: int, dtype: torch.dtype) -> None:
    rows, places, probs = torch.randn(tokens * k, H).to(dtype), places_of(tokens, k), torch.randn(tokens, k)
    exact = torch.zeros(tokens, H, dtype=torch.float64)
    for choice, row in enumerate(places.tolist()):
        if row >= 0:
            exact[choice // k] += rows[row].double() * probs[choice // k, choice % k].double()
    check(npu.npu_moe_token_unpermute(rows, places, probs), exact, dtype)


def test_weights_in_sixteen_bits_are_multiplied_in_float32() -> None:
    rows, probs = torch.full((2, H), 3.0), torch.tensor([[1 + 2**-7, 2**-9]], dtype=torch.bfloat16)
    got = npu.npu_moe_token_unpermute(rows, torch.tensor([0, 1], dtype=torch.int32), probs)
    assert torch.equal(got, torch.full((1, H), 3 * (1 + 2**-7 + 2**-9)))


def test_without_weights_each_token_has_one_row() -> None:
    rows = torch.randn(3, H)
    got = npu.npu_moe_token_unpermute(rows, torch.tensor([2, -1, 0], dtype=torch.int32))
    assert torch.equal(got, torch.stack([rows[2], torch.zeros(H), rows[0]]))


@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
def test_rows_of_nobody_do_not_leak(filler: float) -> None:
    """Neither by an index below zero, nor by abs() of it with a weight of zero, as vllm-ascend marks them."""
    rows = torch.randn(6, H)
    rows[1] = filler
    places = torch.tensor([0, -1, 2, 3], dtype=torch.int32)
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    want = npu.npu_moe_token_unpermute(rows, places, probs)
    assert want.isfinite().all()
    assert torch.equal(npu.npu_moe_token_unpermute(rows, places.abs(), probs * (places.view(2, 2) >= 0)), want)
    assert torch.equal(npu.npu_moe_token_unpermute(rows[:0], torch.full_like(places, -1), probs), torch.zeros(2, H))


def test_what_a_row_holds_reaches_its_own_token_only() -> None:
    rows = torch.randn(80, H)
    rows[5] = float("nan")
    got = npu.npu_moe_token_unpermute(rows, torch.arange(80, dtype=torch.int32), torch.ones(40, 2))
    assert got.isnan().any(dim=1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("given", ["nothing", "scales", "scales and skip", "everything"])
def test_finalize(given: str, mode: int, tokens: int) -> None:
    k, dtype = 3, torch.float32
    rows, places = torch.randn(tokens * k, H), places_of(tokens, k)
    scales = torch.randn(tokens, k) if given != "nothing" else None
    skip1 = torch.randn(tokens, H) if "skip" in given or given == "everything" else None
    skip2, bias = (torch.randn(tokens, H), torch.randn(E, H)) if given == "everything" else (None, None)
    experts = torch.randint(0, E, (tokens, k), dtype=torch.int32)
    shaped = rows.view(tokens, k, H) if mode in (1, 3) else rows
    got = npu.npu_moe_finalize_routing(shaped, skip1, skip2, bias, scales, places, experts, mode, k)
    exact = torch.zeros(tokens, H, dtype=torch.float64)
    for token in range(tokens):
        for skip in (skip1, skip2):
            exact[token] += 0 if skip is None else skip[token].double()
        for choice in range(k):
            row = places[token + choice * tokens if mode in (0, 1) else token * k + choice].item()
            value = rows[int(row)].double() if row >= 0 else torch.zeros(H, dtype=torch.float64)
            if bias is not None:
                value = value + bias[experts[token, choice].item()].double()
            exact[token] += value * (1 if scales is None else scales[token, choice].double())
    check(got, exact, dtype)


def test_column_and_row_order_are_different_things() -> None:
    rows, places = torch.randn(6, H), torch.arange(6, dtype=torch.int32)
    by_column = npu.npu_moe_finalize_routing(rows, None, None, None, None, places, None, 0, 2)
    assert torch.equal(by_column, rows[:3] + rows[3:])
    by_row = npu.npu_moe_finalize_routing(rows, None, None, None, None, places, None, 2, 2)
    assert torch.equal(by_row, rows[0::2] + rows[1::2])


def test_what_the_kernels_do_not_have_is_refused() -> None:
    rows, places = torch.randn(6, H), torch.arange(6, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="padded_mode"):
        npu.npu_moe_token_unpermute(rows, places, None, True)
    with pytest.raises(ValueError, match="drop_pad_mode is 4"):
        npu.npu_moe_finalize_routing(rows, None, None, None, None, places, None, 4)
    with pytest.raises(ValueError, match="skip1 given: False, skip2 given: True"):
        npu.npu_moe_finalize_routing(rows, None, rows, None, None, places, None)
    with pytest.raises(ValueError, match="export_for_source_row"):
        npu.npu_moe_finalize_routing(rows, None, None, rows, None, places, None)
