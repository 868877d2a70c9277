"""FlatQuant's transform to FP4: microscaled as by npu_dynamic_mx_quant, of Y with the device's roundings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_reference import microscaled, stored_weight
from torch import Tensor

from quant_core.ops.cpu import kronecker

npu = torch.ops.npu

FP4 = 296
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 20).map(lambda half: 2 * half))


def seen(x: Tensor, p1: Tensor, p2: Tensor, **options: float) -> Tensor:
    """What codes and exponents stand for, [m, n1 · n2] in float64."""
    m, n1, n2 = x.shape
    codes, pairs = npu.npu_kronecker_quant(x, p1, p2, dst_dtype=FP4, **options)
    assert (codes.shape, codes.dtype) == ((m, n1 * n2 // 2), torch.uint8)
    assert (pairs.shape, pairs.dtype) == ((m, -(-n1 * n2 // 64), 2), torch.uint8)
    return stored_weight({"weight": codes, "weight_scale": pairs.flatten(1)})


@settings(max_examples=60)
@given(SIZES, st.sampled_from(FLOATS), st.integers(0, 2**30))
def test_the_formula(size: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    """Inputs are small integers, so that both products are exact in every dtype, and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    m, n1, n2 = size
    x = torch.randint(-2, 3, (m, n1, n2), generator=generator).to(dtype)
    p1, p2 = (torch.randint(-1, 2, (n, n), generator=generator).to(dtype) for n in (n1, n2))
    y = p1.to(torch.float64) @ (x.to(torch.float64) @ p2.to(torch.float64))
    assert torch.equal(seen(x, p1, p2), microscaled(y.flatten(1), fp4=True, ties_away=False))


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 2.5 + 2**-9), (torch.float16, 2.5), (torch.bfloat16, 2.5)])
def test_y_is_rounded_to_bfloat16(dtype: torch.dtype, kept: float) -> None:
    """A sum just above a tie of 2 and 3, which only a float32 input keeps; beside 4, for the exponent 0."""
    x = torch.zeros(1, 2, 2, dtype=dtype)
    x[0] = torch.tensor([[2.5, 4.0], [2**-9, 0.0]])
    rows = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=dtype)
    expected = 3.0 if kept > 2.5 else 2.0
    assert seen(x, rows, torch.eye(2, dtype=dtype)).tolist() == [[expected, 4.0, 0.0, 0.0]]


def test_a_clip_ratio_has_no_effect() -> None:
    x, p1, p2 = torch.randn(5, 3, 8), torch.randn(3, 3), torch.randn(8, 8)
    assert torch.equal(seen(x, p1, p2, clip_ratio=0.5), seen(x, p1, p2))


def test_blocks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p1, p2 = torch.randn(50, 3, 8), torch.randn(3, 3), torch.randn(8, 8)
    whole = seen(x, p1, p2)
    monkeypatch.setattr(kronecker, "_BLOCK", 24 * 7)
    assert torch.equal(seen(x, p1, p2), whole)


def test_an_odd_last_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 2"):
        seen(torch.zeros(2, 4, 3), torch.zeros(4, 4), torch.zeros(3, 3))
