"""E2M1 codes and E8M0 exponents against their definitions in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant_core import microscaling as mx

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

FINITE = st.floats(-20, 20, width=32, allow_subnormal=False)
NEAR_TIES = st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]).flatmap(
    lambda tie: st.sampled_from(
        [tie, math.nextafter(tie, 0), float(np.nextafter(np.float32(tie), np.float32(9))), -tie]
    )
)


def nearest(value: float, ties_away: bool) -> float:
    """The E2M1 value nearest to a float32 value."""
    distances = [abs(abs(value) - v) for v in VALUES]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = max(best) if ties_away else next(c for c in best if len(best) == 1 or c % 2 == 0)
    return math.copysign(VALUES[code], value)


@given(st.lists(FINITE | NEAR_TIES, min_size=1, max_size=20), st.booleans())
def test_codes_are_those_of_the_nearest_value(values: list[float], ties_away: bool) -> None:
    stored = torch.tensor(values, dtype=torch.float32)
    codes = mx.e2m1_codes(stored, ties_away)
    assert codes.dtype == torch.uint8
    assert mx.e2m1_values(codes).tolist() == [nearest(value, ties_away) for value in stored.tolist()]


def test_special_values_saturate_and_nan_is_zero() -> None:
    assert mx.e2m1_codes(torch.tensor([math.inf, -math.inf, 1e30, math.nan, -0.0])).tolist() == [7, 15, 7, 0, 0]


def test_every_code_has_its_value_and_comes_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = mx.e2m1_values(codes)
    assert values.tolist() == [*VALUES, *(-v for v in VALUES)]
    negative_zero = 8
    assert mx.e2m1_codes(values).tolist() == [c if c != negative_zero else 0 for c in range(16)]


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.integers(0, 15)))
def test_packing_puts_the_first_value_into_the_lower_half(codes: np.ndarray) -> None:
    doubled = torch.from_numpy(np.concatenate([codes, codes[..., ::-1]], axis=-1).copy())
    packed = mx.pack_e2m1(doubled)
    numbers = doubled.numpy().astype(int)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == (numbers[..., 0::2] + 16 * numbers[..., 1::2]).tolist()
    assert torch.equal(mx.unpack_e2m1(packed), doubled)
    assert torch.equal(mx.unpack_e2m1(packed.view(torch.int8)), doubled)


def test_an_odd_number_of_values_is_refused() -> None:
    with pytest.raises(ValueError, match="odd number"):
        mx.pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))


def test_every_exponent_has_its_value() -> None:
    values = mx.e8m0_values(torch.arange(256, dtype=torch.uint8)).to(torch.float64)
    assert values[:-1].tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert math.isnan(values[-1])


def floor_log2(value: float) -> int:
    """floor(log2(value)), exactly."""
    return math.frexp(value)[1] - 1


@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([2, 8, 15]))
def test_floor_exponents(peak: float, emax: int) -> None:
    expected = max(floor_log2(peak) - emax + 127, 0)
    powers = torch.tensor([peak, 2.0 ** floor_log2(peak)], dtype=torch.float32)
    assert mx.floor_exponents(powers, emax).tolist() == [expected, expected]


@given(st.floats(2.0**-140, 2.0**127, width=32))
def test_ceil_exponents(scale: float) -> None:
    (found,) = mx.ceil_exponents(torch.tensor([scale], dtype=torch.float32)).tolist()
    exact = floor_log2(scale) + (2.0 ** floor_log2(scale) != scale) + 127
    assert found == (exact if scale >= 2.0**-126 else int(scale > 2.0**-127))


def test_exponents_of_zero_and_of_what_is_not_finite() -> None:
    special = torch.tensor([0.0, math.inf, math.nan])
    assert mx.floor_exponents(special, 8).tolist() == [0, 255, 255]
    assert mx.ceil_exponents(special).tolist() == [0, 255, 255]


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 64, 80])
def test_blocks_include_a_short_last_one(k: int) -> None:
    values = torch.arange(1.0, 2 * k + 1).view(2, k)
    blocks = mx.in_blocks(values)
    assert blocks.shape == (2, math.ceil(k / 32), 32)
    assert mx.blocks_of(k) == math.ceil(k / 32)
    flat = blocks.flatten(1)
    assert torch.equal(flat[:, :k], values)
    assert not flat[:, k:].any()
    factors = torch.rand(2, mx.blocks_of(k) + 1)
    exact = values * factors.repeat_interleave(32, dim=1)[:, :k]
    assert torch.equal(mx.scale_blocks_(values.clone(), factors), exact)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_pairs_of_exponents(blocks: int) -> None:
    exponents = torch.arange(1, 2 * blocks + 1, dtype=torch.uint8).view(2, blocks)
    pairs = mx.pair_exponents(exponents)
    assert pairs.shape == (2, math.ceil(blocks / 2), 2)
    for b in range(blocks):
        assert torch.equal(pairs[:, b // 2, b % 2], exponents[:, b])
    assert blocks % 2 == 0 or not pairs[:, -1, 1].any()
