"""FlatQuant's transform and quantisation against the formula in float64, and its roundings by hand."""

from typing import Any

import pytest
import torch
from bits import unpack_eights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_core.ops.cpu import kronecker

npu = torch.ops.npu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantised(x: Tensor, p1: Tensor, p2: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes [m, n1, n2] as float64, and scales."""
    codes, scales = npu.npu_kronecker_quant(x, p1, p2, clip, torch.int32)
    assert (codes.dtype, scales.dtype) == (torch.int32, torch.float32)
    return unpack_eights(codes).to(torch.float64), scales


def token(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """One token [1, 1, 8] of these values and zeros."""
    return torch.tensor([*values, *[0.0] * (8 - len(values))], dtype=dtype).view(1, 1, 8)


def unit(size: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(size, dtype=dtype)


SIZES = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 4).map(lambda n: n * 8))


@settings(max_examples=60)
@given(SIZES, st.sampled_from(FLOATS), st.sampled_from([None, 1.0, 0.98, 0.5]), st.integers(0, 2**30))
def test_the_formula(size: tuple[int, int, int], dtype: torch.dtype, clip: float | None, seed: int) -> None:
    """Inputs are small integers, so that both products are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    m, n1, n2 = size
    x = torch.randint(-2, 3, (m, n1, n2), generator=generator).to(dtype)
    p1, p2 = (torch.randint(-1, 2, (n, n), generator=generator).to(dtype) for n in (n1, n2))
    codes, scales = quantised(x, p1, p2, clip)
    y = p1.to(torch.float64) @ (x.to(torch.float64) @ p2.to(torch.float64))
    want = y.abs().amax((1, 2)) * (clip or 1.0) / 7
    torch.testing.assert_close(scales.to(torch.float64), want, rtol=1e-6, atol=0)
    exact = torch.where(want[:, None, None] > 0, y / want[:, None, None], 0).clamp(-8, 7)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * 2**-11  # the quotient is rounded to float16
    assert m == 0 or bool(((codes - exact).abs() <= 0.5 + tolerance).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_by_hand(dtype: torch.dtype) -> None:
    """p1 mixes rows, p2 columns: [[1, 2], [3, 4]] becomes [[3, 4], [1, 2]] and then [[4, 3], [2, 1]]; 4 is 7."""
    x = torch.zeros(1, 2, 8, dtype=dtype)
    x[0, :, :2] = torch.tensor([[1, 2], [3, 4]])
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    codes, scales = quantised(x, swap, torch.block_diag(swap, unit(6, dtype)))
    assert codes[0, :, :2].tolist() == [[7, 5], [4, 2]]  # 5.25, 3.5 to even, 1.75
    assert scales.item() == torch.tensor(4 / 7, dtype=torch.float32).item()
    one_way = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=dtype)  # the first new row is the sum of both
    codes, _ = quantised(x, one_way, torch.block_diag(one_way, unit(6, dtype)))
    assert codes[0, :, :2].tolist() == [[3, 7], [2, 5]]  # [[4, 10], [3, 7]] · 7 / 10


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_lies_beyond_the_clip_saturates_at_minus_eight_and_seven(dtype: torch.dtype) -> None:
    codes, scales = quantised(token(8, -8, 4, -2, dtype=dtype), unit(1, dtype), unit(8, dtype), 0.5)
    assert codes[0, 0, :4].tolist() == [7, -8, 7, -4]  # 14, -14, 7, -3.5 to even
    assert scales.item() == torch.tensor(4 / 7, dtype=torch.float32).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_token_has_scale_zero(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 8).to(dtype)
    x[1] = 0
    codes, scales = quantised(x, unit(4, dtype), unit(8, dtype), 0.98)
    assert (scales > 0).tolist() == [True, False, True]
    assert scales[1] == 0
    assert not codes[1].any()


SMALL = 2.0**-10


@pytest.mark.parametrize(
    ("dtype", "inner", "outer"),
    [
        (torch.float32, 1 + SMALL, 1 + SMALL),
        (torch.float16, 1 + SMALL, 1 + SMALL),
        (torch.bfloat16, 1, 1 + SMALL),  # the inner product to bfloat16, the outer one to float16
    ],
)
def test_the_products_are_rounded_as_on_the_device(dtype: torch.dtype, inner: float, outer: float) -> None:
    def seventh(value: float) -> float:
        return (torch.tensor(value, dtype=torch.float32) / 7).item()

    columns = unit(8, dtype)
    columns[1, 0] = 1  # the first new column is the sum of two
    _, scales = quantised(token(1, SMALL, dtype=dtype), unit(1, dtype), columns)
    assert scales.item() == seventh(inner)
    rows = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=dtype)
    x = torch.cat([token(1, dtype=dtype), token(SMALL, dtype=dtype)], dim=1)
    _, scales = quantised(x, rows, unit(8, dtype))
    assert scales.item() == seventh(outer)
    _, scales = quantised(torch.cat([token(1, dtype=dtype), token(SMALL / 2, dtype=dtype)], 1), rows, unit(8, dtype))
    assert scales.item() == seventh(1 + SMALL / 2 if dtype == torch.float32 else 1)


def test_the_quotient_is_rounded_to_float16_before_it_is_to_an_integer() -> None:
    """504 · 7 / 1411 = 2.50035, which float16 makes 2.5, hence 2; a float32 input is quantised without that."""
    for dtype, code in ((torch.float16, 2), (torch.float32, 3)):
        codes, _ = quantised(token(1411, 504, dtype=dtype), unit(1, dtype), unit(8, dtype))
        assert codes[0, 0, :2].tolist() == [7, code]


def test_blocks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p1, p2 = torch.randn(50, 3, 8), torch.randn(3, 3), torch.randn(8, 8)
    whole = npu.npu_kronecker_quant(x, p1, p2, 0.98)
    for block in (1, 24 * 7):
        monkeypatch.setattr(kronecker, "_BLOCK", block)
        assert all(map(torch.equal, npu.npu_kronecker_quant(x, p1, p2, 0.98), whole))


@pytest.mark.parametrize("target", [None, torch.int32, torch.quint4x2])
def test_int4_has_three_names(target: torch.dtype | None) -> None:
    x, p1, p2 = torch.randn(5, 3, 8), torch.randn(3, 3), torch.randn(8, 8)
    got = npu.npu_kronecker_quant(x, p1, p2, dst_dtype=target)
    assert all(map(torch.equal, got, npu.npu_kronecker_quant(x, p1, p2, 1.0)))


X, P1, P2 = torch.zeros(2, 3, 8), torch.zeros(3, 3), torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], P1, P2), {}, ValueError, r"x \[3, 8\]"),
        ((X, P2, P1), {}, ValueError, r"p1 \[8, 8\] and p2 \[3, 3\]"),
        ((X[..., :3], P1, P1), {}, ValueError, "not a multiple of 8"),
        ((X.to(torch.bfloat16), P1, P2), {}, ValueError, "must be one dtype"),
        ((X, P1, P2), {"dst_dtype": torch.int8}, NotImplementedError, "int4 and FP4, not torch.int8"),
        ((X, P1, P2), {"dst_type_max": 6.0}, NotImplementedError, "dst_type_max=6.0"),
    ],
)
def test_what_the_kernel_does_not_take(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        npu.npu_kronecker_quant(*arguments, **options)
