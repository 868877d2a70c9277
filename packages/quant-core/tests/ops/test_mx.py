"""Microscaling quantisation against its definition, element by element in Python's float64."""

import math
from collections.abc import Callable

import pytest
import torch
from bits import e2m1
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

npu = torch.ops.npu

E4M3, E5M2, FP4 = torch.float8_e4m3fn, torch.float8_e5m2, 296

# Largest finite value, its exponent, explicit mantissa bits, smallest normal exponent.
FORMATS = {E4M3: (448.0, 8, 3, -6), E5M2: (57344.0, 15, 2, -14), FP4: (6.0, 2, 1, 0)}


def rounded(value: float, target: object, mode: str) -> float:
    """To the nearest element, saturated."""
    largest, _, bits, lowest = FORMATS[target]
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, lowest) - bits)
    steps = abs(value) / step  # exact: a power of two
    whole = math.floor(steps + 0.5) if mode == "round" else round(steps)
    return math.copysign(min(whole * step, largest), value)


def exact(values: Tensor, target: object, mode: str = "rint", algorithm: int = 0) -> tuple[list[int], list[float]]:
    """Exponents and elements of one row."""
    largest, emax, _, _ = FORMATS[target]
    row, exponents, elements = values.to(torch.float64).tolist(), [], []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        peak = max(map(abs, block))
        if algorithm == 1:
            scale = float(torch.tensor(peak, dtype=torch.float32) / largest)
            exponent = -127 if scale == 0 else math.ceil(math.log2(scale))
        else:
            exponent = -127 if peak == 0 else math.frexp(peak)[1] - 1 - emax
        exponent = max(exponent, -127)
        exponents.append(exponent + 127)
        elements += [rounded(value / 2.0**exponent, target, mode) for value in block]
    return exponents, elements


def elements_of(codes: Tensor) -> Tensor:
    """What the operator returned, as values."""
    return e2m1(codes) if codes.dtype == torch.uint8 else codes.to(torch.float32)


RULES = [
    (E4M3, "rint", 0),
    (E4M3, "rint", 1),
    (E5M2, "rint", 0),
    (E5M2, "rint", 1),
    (FP4, "rint", 0),
    (FP4, "round", 0),
]


@settings(max_examples=60)
@given(
    st.sampled_from(RULES),
    st.integers(0, 3),
    st.integers(1, 50).map(lambda half: 2 * half),
    st.integers(-60, 60),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_the_definition(
    rule: tuple[object, str, int], rows: int, k: int, magnitude: int, coarse: bool, seed: int
) -> None:
    """Of numbers with many ties (few bits), and of others; with blocks of zeros."""
    target, mode, algorithm = rule
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=generator)
    values = ((values * 8).round() / 8 if coarse else values) * 2.0**magnitude
    values[:, 32:64] *= torch.rand(rows, 1, generator=generator).round()
    codes, pairs = npu.npu_dynamic_mx_quant(values, dst_type=target, round_mode=mode, scale_alg=algorithm)
    assert codes.shape == ((rows, k // 2) if target == FP4 else (rows, k))
    assert codes.dtype == (torch.uint8 if target == FP4 else target)
    assert (pairs.shape, pairs.dtype) == ((rows, math.ceil(k / 64), 2), torch.uint8)
    blocks = math.ceil(k / 32)
    for row in range(rows):
        exponents, elements = exact(values[row], target, mode, algorithm)
        assert pairs[row].flatten().tolist() == exponents + [0] * (blocks % 2)
        assert elements_of(codes[row : row + 1])[0].tolist() == elements


@pytest.mark.parametrize(("value", "even", "away"), [(0.25, 0, 0.5), (1.25, 1, 1.5), (2.5, 2, 3), (5.0, 4, 6)])
def test_ties_of_fp4(value: float, even: float, away: float) -> None:
    row = torch.tensor([[4.0, value, -value, 0.0]])
    for mode, expected in (("rint", even), ("round", away)):
        codes, pairs = npu.npu_dynamic_mx_quant(row, round_mode=mode)
        assert elements_of(codes).tolist() == [[4.0, expected, -expected, 0.0]]
        assert pairs.tolist() == [[[127, 0]]]


def test_what_the_floor_rule_leaves_above_the_largest_element_saturates() -> None:
    row = torch.tensor([[7.9, -7.9] + [1.0] * 30])
    codes, pairs = npu.npu_dynamic_mx_quant(row)
    assert (elements_of(codes)[0, :2].tolist(), pairs[0, 0, 0].item()) == ([6.0, -6.0], 127)
    codes, pairs = npu.npu_dynamic_mx_quant(row, dst_type=E4M3, scale_alg=1)
    assert (elements_of(codes)[0, 0].item(), pairs[0, 0, 0].item()) == (256.0, 127 - 5)  # 7.9 · 2^5 to the nearest


@pytest.mark.parametrize("target", [E4M3, FP4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_that_is_not_finite_has_the_exponent_nan(target: object, bad: float) -> None:
    """So that the product is NaN, and shows; other blocks are as ever."""
    row = torch.ones(2, 64)
    row[0, 5] = bad
    codes, pairs = npu.npu_dynamic_mx_quant(row, dst_type=target)
    assert pairs[0, 0, 0] == 255
    assert not elements_of(codes)[0, :32].any()
    assert torch.equal(elements_of(codes)[0, 32:], elements_of(codes)[1, 32:])
    assert 255 not in pairs[1].tolist()[0] + pairs[0, 0, 1:].tolist()


@pytest.mark.parametrize("target", [E4M3, FP4])
def test_another_axis(target: object) -> None:
    values = torch.randn(2, 96, 4)
    codes, pairs = npu.npu_dynamic_mx_quant(values, axis=1, dst_type=target)
    turned, turned_pairs = npu.npu_dynamic_mx_quant(values.movedim(1, -1), dst_type=target)
    assert pairs.shape == (2, 2, 4, 2)
    assert torch.equal(elements_of(codes), elements_of(turned).movedim(-1, 1))
    assert torch.equal(pairs, turned_pairs.movedim(-2, 1))


def test_many_tokens_are_quantised_as_few() -> None:
    values = torch.randn(33000, 64).to(torch.bfloat16)
    codes, pairs = npu.npu_dynamic_mx_quant(values)
    for part in (slice(0, 7), slice(32990, 33000)):
        own, own_pairs = npu.npu_dynamic_mx_quant(values[part])
        assert torch.equal(codes[part], own)
        assert torch.equal(pairs[part], own_pairs)


def test_a_least_maximum() -> None:
    values = torch.full((1, 32), 1e-6)
    _, pairs = npu.npu_dynamic_mx_quant(values, dst_type=E4M3, scale_alg=1, max_low_bound=448.0)
    assert pairs[0, 0, 0] == 127


UNSUPPORTED: list[dict[str, object]] = [
    {"round_mode": "floor"},
    {"dst_type": E4M3, "round_mode": "round"},
    {"scale_alg": 1},
    {"scale_alg": 2},
    {"block_size": 64},
    {"dst_type_max": 6.0},
    {"dst_type": torch.int8},
]


@pytest.mark.parametrize("options", UNSUPPORTED)
def test_what_the_kernel_does_not_have_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="npu_dynamic_mx_quant: the CPU kernel has no"):
        npu.npu_dynamic_mx_quant(torch.zeros(2, 64), **options)


@pytest.mark.parametrize("call", [npu.npu_dynamic_mx_quant, npu.npu_dynamic_dual_level_mx_quant])
def test_an_odd_number_of_fp4_values_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="odd number"):
        call(torch.zeros(2, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["rint", "round"])
@pytest.mark.parametrize("k", [64, 512, 1024, 1100])
def test_two_levels(k: int, mode: str, dtype: torch.dtype) -> None:
    """Level 0 is max|x| / 6 per 512; what it leaves is rounded to x's dtype and microscaled."""
    values = (torch.randn(3, k) * 10.0 ** torch.randint(-3, 4, (3, 1))).to(dtype)
    values[1] = 0
    codes, level0, pairs = npu.npu_dynamic_dual_level_mx_quant(values, round_mode=mode)
    assert (codes.shape, level0.shape, pairs.shape) == ((3, k // 2), (3, -(-k // 512)), (3, -(-k // 64), 2))
    for group, part in enumerate(values.split(512, dim=1)):
        peak = part.to(torch.float32).abs().amax(1)
        torch.testing.assert_close(level0[:, group], peak / 6, rtol=0, atol=0)
        quotients = torch.where(peak[:, None] > 0, part.to(torch.float32) / (peak / 6)[:, None], 0).to(dtype)
        own, own_pairs = npu.npu_dynamic_mx_quant(quotients, round_mode=mode)
        start = group * 512
        assert torch.equal(codes[:, start // 2 : start // 2 + own.shape[1]], own)
        assert torch.equal(pairs[:, start // 64 : start // 64 + own_pairs.shape[1]], own_pairs)


def test_two_levels_multiply_smooth_scales_first() -> None:
    values, smooth = torch.randn(3, 64), torch.rand(64)
    found = npu.npu_dynamic_dual_level_mx_quant(values, smooth_scale=smooth)
    assert all(map(torch.equal, found, npu.npu_dynamic_dual_level_mx_quant(values * smooth)))
    with pytest.raises(NotImplementedError, match="round_mode 'floor'"):
        npu.npu_dynamic_dual_level_mx_quant(values, round_mode="floor")
