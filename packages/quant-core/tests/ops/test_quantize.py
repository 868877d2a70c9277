"""Activation quantisers against formulas in float64."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from bits import unpack_eights
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

npu = torch.ops.npu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = {torch.qint8: (torch.int8, -128, 127), torch.quint8: (torch.uint8, 0, 255)}


def check_rounding(codes: Tensor, exact: Tensor, low: int = -128, high: int = 127) -> None:
    """Codes are the nearest integers to float64 values, up to what float32 arithmetic can shift across a tie."""
    distance = (codes.to(torch.float64) - exact.clamp(low, high)).abs()
    assert distance.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", CODES)
@pytest.mark.parametrize("div_mode", [True, False])
def test_quantize_rounds_ties_to_even_and_saturates(dtype: torch.dtype, target: torch.dtype, div_mode: bool) -> None:
    """All values are exact in every dtype, so the codes must be equal and not only near."""
    x = (torch.arange(-1200, 1200).to(torch.float64) / 4).repeat(3, 1)
    x = x[:, (x[0].abs() < 64) | (x[0] % 2 == 0)]  # what bfloat16 can hold
    carrier, low, high = CODES[target]
    got = npu.npu_quantize(x.to(dtype), torch.tensor([0.5]), torch.tensor([-3.0]), target, -1, div_mode)
    want = torch.round((x / 0.5 if div_mode else x * 0.5) - 3).clamp(low, high)
    assert got.dtype == carrier
    assert torch.equal(got.to(torch.float64), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((4, 5, 6), -1), ((4, 5, 6), 0), ((4, 5, 6), 1), ((7, 3), -2)])
def test_quantize_divides_along_any_axis(dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape).to(dtype)
    count = shape[axis]
    scales, zero_points = torch.rand(count) / 50 + 0.004, torch.randint(-20, 20, (count,)).to(torch.float32)
    got = npu.npu_quantize(x, scales, zero_points, torch.qint8, axis, True)
    along = [1] * len(shape)
    along[axis] = count
    exact = x.to(torch.float64) / scales.to(torch.float64).view(along) + zero_points.view(along)
    check_rounding(got, exact)


@pytest.mark.parametrize(("axis", "means"), [(-1, 2), (1, 2), (0, 2), (-2, 1)])
def test_quantize_multiplies_along_the_last_axis_unless_told_minus_two(axis: int, means: int) -> None:
    x = torch.randn(4, 6, 6)
    scales = torch.rand(6) * 50
    got = npu.npu_quantize(x, scales, None, torch.qint8, axis, False)
    along = [6 if i == means else 1 for i in range(3)]
    check_rounding(got, x.to(torch.float64) * scales.to(torch.float64).view(along))


def test_quantize_multiplies_by_a_reciprocal_that_was_rounded_before() -> None:
    """vllm-ascend's call: the reciprocal in the model's dtype, repeated for each feature."""
    x = (torch.randn(16, 32) * 3).to(torch.bfloat16)
    reciprocal = torch.full((32,), 1 / 0.0237).to(torch.bfloat16)
    offset = torch.full((32,), 5, dtype=torch.bfloat16)
    got = npu.npu_quantize(x, reciprocal, offset, torch.qint8, -1, False)
    want = torch.round(x.to(torch.float64) * reciprocal.to(torch.float64) + 5).clamp(-128, 127)
    assert torch.equal(got.to(torch.float64), want)  # products of two bfloat16 are exact in float32
    assert not torch.equal(got, npu.npu_quantize(x, torch.tensor([0.0237]), offset[:1], torch.qint8, -1, True))


def test_quantize_of_what_is_no_number() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0]])
    got = npu.npu_quantize(x, torch.tensor([1e-3]), None, torch.qint8)
    assert got.tolist() == [[0, 127, -128, 127, -128, 0]]


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (2, 0, 8), (2, 3, 8)])
def test_quantize_keeps_the_shape(shape: tuple[int, ...]) -> None:
    got = npu.npu_quantize(torch.randn(shape), torch.tensor([0.1]), torch.tensor([1.0]), torch.qint8, -1)
    assert (got.shape, got.dtype) == (shape, torch.int8)


def test_quantize_gives_rows_whatever_the_strides() -> None:
    x = torch.randn(6, 4).t()
    got = npu.npu_quantize(x, torch.tensor([0.1]), None, torch.qint8, -1)
    assert got.is_contiguous()
    assert torch.equal(got, npu.npu_quantize(x.contiguous(), torch.tensor([0.1]), None, torch.qint8, -1))


def test_quantize_refuses_what_it_does_not_have() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(NotImplementedError, match="qint32"):
        npu.npu_quantize(x, torch.tensor([0.1]), None, torch.qint32, -1)
    with pytest.raises(NotImplementedError, match="quint4x2"):  # as on the device, which only multiplies
        npu.npu_quantize(x, torch.tensor([0.1]), None, torch.quint4x2, -1, True)
    with pytest.raises(ValueError, match=r"\[4, 12\]"):
        npu.npu_quantize(torch.randn(4, 12), torch.tensor([0.1]), None, torch.quint4x2, -1, False)
    with pytest.raises(ValueError, match="5 scales"):
        npu.npu_quantize(x, torch.rand(5), None, torch.qint8, -1)
    with pytest.raises(ValueError, match="dtype number 77"):
        npu.npu_quantize(x, torch.tensor([0.1]), None, 77, -1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (127, 8), (128, 8), (129, 8), (33000, 8), (2, 3, 64)])
def test_dynamic_quant_is_the_largest_magnitude_over_127(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scales = npu.npu_dynamic_quant(x)
    exact = x.to(torch.float64)
    want = exact.abs().amax(-1) / 127
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == (shape, torch.int8, shape[:-1], torch.float32)
    assert torch.allclose(scales.to(torch.float64), want, rtol=2**-23, atol=0)
    check_rounding(codes, exact / want[..., None])
    assert codes.abs().amax(-1).eq(127).all()


def test_dynamic_quant_of_no_tokens() -> None:
    codes, scales = npu.npu_dynamic_quant(torch.randn(0, 64, dtype=torch.bfloat16))
    assert (codes.shape, scales.shape) == ((0, 64), (0,))


def test_dynamic_quant_of_zero_rows_has_scale_zero() -> None:
    x = torch.randn(5, 16)
    x[[1, 3]] = 0
    codes, scales = npu.npu_dynamic_quant(x)
    assert scales[[1, 3]].tolist() == [0, 0]
    assert not codes[[1, 3]].any()
    assert torch.equal(codes[[0, 2, 4]], npu.npu_dynamic_quant(x[[0, 2, 4]])[0])


def test_dynamic_quant_multiplies_smooth_scales_first() -> None:
    x, smooth = torch.randn(9, 16).to(torch.bfloat16), torch.rand(16).to(torch.bfloat16)
    codes, scales = npu.npu_dynamic_quant(x, smooth_scales=smooth)
    exact = x.to(torch.float64) * smooth.to(torch.float64)  # and not rounded to bfloat16 in between
    assert torch.allclose(scales.to(torch.float64), exact.abs().amax(-1) / 127, rtol=2**-23, atol=0)
    check_rounding(codes, exact / (exact.abs().amax(-1, keepdim=True) / 127))


def test_dynamic_quant_of_what_is_no_number_spoils_its_row_only() -> None:
    x = torch.ones(4, 8)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    codes, scales = npu.npu_dynamic_quant(x)
    assert math.isnan(scales[1])
    assert math.isinf(scales[2])
    assert codes[[0, 3]].eq(127).all()
    assert not codes[1:3].any()
    assert (codes * scales[:, None]).isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "options",
    [
        {"group_index": torch.tensor([4])},
        {"quant_mode": "pertensor"},
        {"dst_type": torch.qint32},
        {"dst_type_max": 7.0},
    ],
)
def test_dynamic_quant_refuses_what_it_does_not_have(options: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError):
        npu.npu_dynamic_quant(torch.randn(4, 8), **options)


def test_dynamic_quant_wants_rows_as_the_device_does() -> None:
    with pytest.raises(ValueError, match="two axes"):
        npu.npu_dynamic_quant(torch.randn(8))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=20))
def test_dynamic_quant_loses_half_a_step_at_most(values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    assume(x.abs().max() > 1e-30)  # below, float32 itself runs out of digits
    codes, scales = npu.npu_dynamic_quant(x)
    error = (codes.to(torch.float64) * scales.to(torch.float64) - x.to(torch.float64)).abs().max()
    assert error <= scales.to(torch.float64).item() * (0.5 + 1e-4)


def bits_of(value: float) -> int:
    """The 32 bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def nearest_fp19(bits: int) -> int:
    """The bits of the nearest number with 10 mantissa bits, the even one at a tie, by comparing exact distances."""
    low, high = bits & ~0x1FFF, (bits & ~0x1FFF) + 0x2000
    value, below, above = (Fraction(struct.unpack("<f", struct.pack("<I", b))[0]) for b in (bits, low, high))
    if abs(value - below) == abs(above - value):
        return high if (low >> 13) & 1 else low
    return low if abs(value - below) < abs(above - value) else high


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_trans_quant_param_keeps_19_bits_and_sets_bit_46(scales: list[float]) -> None:
    got = npu.npu_trans_quant_param(torch.tensor(scales, dtype=torch.float32))
    assert got.tolist() == [(bits_of(s) & 0xFFFFE000) | 1 << 46 for s in scales]


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=9), st.sampled_from([1, -1]))
def test_trans_quant_param_rounds_to_nearest_in_mode_1(scales: list[float], sign: int) -> None:
    scales = [sign * scale for scale in scales]
    got = npu.npu_trans_quant_param(torch.tensor(scales, dtype=torch.float32), None, 1)
    assert got.tolist() == [nearest_fp19(bits_of(s)) | 1 << 46 for s in scales]


def test_trans_quant_param_rounds_ties_to_even_in_mode_1() -> None:
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 5 * 2**-11]
    got = npu.npu_trans_quant_param(torch.tensor(ties), None, 1)
    assert [(bits & 0xFFFFFFFF) - bits_of(1.0) >> 13 for bits in got.tolist()] == [0, 2, 2]


@pytest.mark.parametrize("offset", [-300.0, -256.0, -7.5, -0.4, 0.0, 0.5, 1.5, 42.0, 255.0, 1000.0])
def test_trans_quant_param_puts_the_offset_into_nine_bits(offset: float) -> None:
    got = npu.npu_trans_quant_param(torch.tensor([0.37]), torch.tensor([offset])).item()
    nine = min(max(round(offset), -256), 255) % 512  # Python rounds ties to even as well
    assert got == (1 << 46) | (nine << 37) | (bits_of(0.37) & 0xFFFFE000)


@pytest.mark.parametrize(
    ("scale", "offset", "shape"), [((5,), (1,), (5,)), ((1,), (5,), (5,)), ((5,), (5,), (5,)), ((1, 5), (5,), (1, 5))]
)
def test_trans_quant_param_has_the_longer_shape(scale: tuple[int], offset: tuple[int], shape: tuple[int]) -> None:
    got = npu.npu_trans_quant_param(torch.rand(scale), torch.rand(offset))
    assert (got.shape, got.dtype) == (shape, torch.int64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 64), (7, 24), (129, 8), (33000, 8), (2, 3, 16)])
def test_dynamic_quant_to_int4(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The largest magnitude of a token becomes 7; a zero token has scale 0 and zero codes."""
    x = torch.randn(shape).to(dtype)
    x.view(-1, shape[-1])[2:3] = 0
    packed, scales = npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
    exact = x.to(torch.float64)
    want = exact.abs().amax(-1) / 7
    assert (packed.shape, packed.dtype) == ((*shape[:-1], shape[-1] // 8), torch.int32)
    assert (scales.shape, scales.dtype) == (shape[:-1], torch.float32)
    assert torch.allclose(scales.to(torch.float64), want, rtol=2**-23, atol=0)
    codes, safe = unpack_eights(packed), want.where(want > 0, 1)
    if len(x):
        check_rounding(codes, exact / safe[..., None])
    assert torch.equal(codes.abs().amax(-1), torch.full(shape[:-1], 7, dtype=torch.int8).where(want > 0, 0))


def test_the_smallest_numbers_saturate_in_int4() -> None:
    """Their scale is rounded to a multiple of the smallest number, beyond which the codes must not wrap around."""
    x = torch.tensor([[10, -10, 9, 1, 0, 0, 0, -1]]) * torch.tensor(2.0**-149)
    packed, scale = npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
    assert scale.item() == 2**-149
    assert unpack_eights(packed).tolist() == [[7, -8, 7, 1, 0, 0, 0, -1]]


def test_dynamic_quant_to_int4_smooths_and_wants_whole_int32() -> None:
    x, smooth = torch.randn(5, 16), torch.rand(16) + 0.5
    want = npu.npu_dynamic_quant(x * smooth, dst_type=torch.quint4x2)
    torch.testing.assert_close(npu.npu_dynamic_quant(x, smooth_scales=smooth, dst_type=torch.quint4x2), want)
    with pytest.raises(ValueError, match=r"\[5, 12\]"):
        npu.npu_dynamic_quant(torch.randn(5, 12), dst_type=torch.quint4x2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("axis", "count"), [(-1, 16), (1, 16), (-2, 5), (-1, 1)])
def test_quantize_to_int4_multiplies_and_saturates(dtype: torch.dtype, axis: int, count: int) -> None:
    x, scales = (torch.randn(5, 16) * 9).to(dtype), torch.rand(count) + 0.5
    got = npu.npu_quantize(x, scales, torch.tensor([1.0]), torch.quint4x2, axis, False)
    codes = unpack_eights(got)
    exact = x.to(torch.float64) * scales.to(torch.float64).reshape((-1, 1) if axis == -2 else (1, -1)) + 1
    check_rounding(codes, exact, -8, 7)
    assert (codes.min().item(), codes.max().item()) == (-8, 7)
