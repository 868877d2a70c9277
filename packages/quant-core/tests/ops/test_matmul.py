"""npu_quant_matmul against formulas in float64, with each int8 product that is right on this processor."""

import math

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")

M, K, N = 7, 40, 24
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def codes(*shape: int) -> Tensor:
    """Random int8 values with all extremes among them."""
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    values.flatten()[:2] = torch.tensor([127, -128], dtype=torch.int8)[: values.numel()]
    return values


def weight(k: int, n: int) -> Tensor:
    """[k, n] as schemes hold it: the transposed view of [n, k]."""
    return codes(n, k).t()


def integer_sums(a: Tensor, b: Tensor) -> Tensor:
    """The exact product, as float64."""
    return a.to(torch.float64) @ b.to(torch.float64)


def truncated(scales: Tensor) -> Tensor:
    """float32 scales with 10 mantissa bits, in float64 and without a look at any bit."""
    mantissa, exponent = torch.frexp(scales.to(torch.float64))
    return torch.ldexp(torch.trunc(mantissa * 2**11) / 2**11, exponent)


def check(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Equal to a float64 result up to the rounding to the dtype, and a few roundings in float32 before."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    tolerance = (torch.finfo(dtype).eps / 2 + 2**-21) * exact.abs() + 2**-20 * exact.abs().max() * 2**-3
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


SCALES = {
    "one float32": lambda n: torch.rand(1) / 100,
    "float32": lambda n: torch.rand(n) / 100 + 1e-4,
    "bfloat16": lambda n: (torch.rand(n) / 100 + 1e-4).to(torch.bfloat16),
    "encoded": lambda n: npu.npu_trans_quant_param(torch.rand(n) / 100 + 1e-4),
    "bits only": lambda n: (torch.rand(n) / 100 + 1e-4).view(torch.int32).to(torch.int64),  # as msModelSlim stores it
}


def scale_values(scale: Tensor, rounded: bool) -> Tensor:
    """What a scale of any form means, in float64."""
    if scale.dtype == torch.int64:
        return truncated((scale % 2**32).to(torch.int32).view(torch.float32))
    return truncated(scale) if rounded else scale.to(torch.float64)


@pytest.mark.parametrize("bias", [None, torch.int32, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("per_token", [False, True])
def test_floating_outputs(form: str, dtype: torch.dtype, bias: torch.dtype | None, per_token: bool) -> None:
    a, b, scale = codes(M, K), weight(K, N), SCALES[form](N)
    tokens = torch.rand(M) + 0.5 if per_token else None
    added = None if bias is None else (torch.randn(N) * 50).to(bias)
    got = npu.npu_quant_matmul(a, b, scale, pertoken_scale=tokens, bias=added, output_dtype=dtype)
    sums = integer_sums(a, b)
    if bias == torch.int32:
        sums = sums + added
    # Without per-token scales the matmul unit makes float16 results itself, with shortened scales.
    exact = sums * scale_values(scale, rounded=dtype == torch.float16 and not per_token)
    if tokens is not None:
        exact = exact * tokens.to(torch.float64)[:, None]
    if bias not in (None, torch.int32):
        exact = exact + added.to(torch.float64)
    check(got, exact, dtype)


def test_scales_of_float16_results_lose_their_last_bits() -> None:
    """By so much that nobody could take it for rounding."""
    a, b = torch.full((1, 8), 100, dtype=torch.int8), torch.full((8, 1), 100, dtype=torch.int8)
    scale = torch.tensor([(1 + 2**-10 - 2**-23) / 8])  # all but the first of its mantissa bits are beyond the tenth
    got = {dtype: npu.npu_quant_matmul(a, b, scale, output_dtype=dtype).item() for dtype in FLOATS}
    assert got[torch.float16] == 80000 / 8
    assert got[torch.float32] == pytest.approx(80000 / 8 * (1 + 2**-10), rel=1e-6)
    per_token = npu.npu_quant_matmul(a, b, scale, pertoken_scale=torch.ones(1), output_dtype=torch.float16).item()
    assert per_token == pytest.approx(80000 / 8 * (1 + 2**-10), abs=4)


@pytest.mark.parametrize("bias", [False, True])
def test_int32_output_is_the_sum_whatever_the_scale(bias: bool) -> None:
    a, b = codes(M, K), weight(K, N)
    added = torch.randint(-(2**30), 2**30, (N,), dtype=torch.int32) if bias else None
    got = npu.npu_quant_matmul(a, b, torch.rand(N), bias=added, output_dtype=torch.int32)
    assert got.dtype == torch.int32
    assert torch.equal(got.to(torch.float64), integer_sums(a, b) + (added if bias else 0))


OFFSETS = {"none": None, "one": torch.tensor([-40.3]), "each": torch.linspace(-300, 300, N)}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("step", [2**-6, 2**-9, 2**-12])
def test_int8_output_goes_through_nine_bits(step: float, bias: bool, offset: str) -> None:
    """Scales are powers of two, so that the codes must be equal. No output dtype means int8."""
    a, b, scale, zero_point = codes(M, K), weight(K, N), torch.full((N,), step), OFFSETS[offset]
    added = torch.randint(-5000, 5000, (N,), dtype=torch.int32) if bias else None
    got = npu.npu_quant_matmul(a, b, scale, offset=zero_point, bias=added)
    nine = torch.round((integer_sums(a, b) + (added if bias else 0)) * step).clamp(-256, 255)
    if zero_point is not None:
        nine = nine + torch.round(zero_point.to(torch.float64)).clamp(-256, 255)
    assert got.dtype == torch.int8
    assert torch.equal(got.to(torch.float64), nine.clamp(-128, 127))
    encoded = npu.npu_trans_quant_param(scale, zero_point)  # the same offset, in the scale's bits 37 to 45
    assert torch.equal(npu.npu_quant_matmul(a, b, encoded, bias=added), got)


def test_int8_output_saturates_twice() -> None:
    a, b = torch.full((1, 8), 127, dtype=torch.int8), torch.full((8, 1), 127, dtype=torch.int8)
    assert npu.npu_quant_matmul(a, b, torch.ones(1)).item() == 127
    # 129032 becomes 255 before -200 is added: 55, not 127.
    assert npu.npu_quant_matmul(a, b, torch.ones(1), offset=torch.tensor([-200.0])).item() == 55
    assert npu.npu_quant_matmul(a, -b, torch.ones(1)).item() == -128


@pytest.mark.parametrize(
    ("left", "right", "bias"),
    [
        ((2, 3, M, K), (K, N), (N,)),
        ((2, M, K), (2, K, N), (2, 1, N)),
        ((2, M, K), (1, K, N), (N,)),
        ((M, K), (3, K, N), (3, 1, N)),
        ((2, 1, M, K), (3, K, N), (N,)),
        ((0, M, K), (1, K, N), (N,)),
        ((0, M, K), (K, N), (N,)),
    ],
)
@pytest.mark.parametrize("kind", [torch.int32, torch.float32])
def test_batches_broadcast(
    left: tuple[int, ...], right: tuple[int, ...], bias: tuple[int, ...], kind: torch.dtype
) -> None:
    a, b, scale = codes(*left), codes(*right), torch.rand(N)
    added = (torch.randn(bias) * 1000).to(kind)
    tokens = torch.rand(M)
    got = npu.npu_quant_matmul(a, b, scale, pertoken_scale=tokens, bias=added, output_dtype=torch.float32)
    factors = scale.to(torch.float64) * tokens.to(torch.float64)[:, None]
    sums = integer_sums(a, b)
    exact = (sums + added) * factors if kind == torch.int32 else sums * factors + added.to(torch.float64)
    if exact.numel() == 0:
        assert got.shape == exact.shape
    else:
        check(got, exact, torch.float32)


@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int8])
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    a, b = codes(tokens, 16), weight(16, 8)
    got = npu.npu_quant_matmul(a, b, torch.full((8,), 2**-8), output_dtype=dtype)
    assert (got.shape, got.dtype) == ((tokens, 8), dtype)
    exact = integer_sums(a, b) * (1 if dtype == torch.int32 else 2**-8)
    limits = (-128, 127) if dtype == torch.int8 else (-math.inf, math.inf)
    want = (exact if dtype.is_floating_point else exact.round()).clamp(*limits).to(dtype)
    assert torch.equal(got, want)


def test_zero_rows_stay_zero_with_the_scale_zero_of_dynamic_quant() -> None:
    x = torch.randn(3, K)
    x[1] = 0
    quantised, tokens = npu.npu_dynamic_quant(x)
    got = npu.npu_quant_matmul(
        quantised, weight(K, N), torch.ones(N), pertoken_scale=tokens, output_dtype=torch.float32
    )
    assert not got[1].any()
    assert got[[0, 2]].all(-1).any()


@pytest.mark.parametrize("k", [1023, 1024, 1025, 4095])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_sums_beyond_the_digits_of_float32(k: int, left: int, right: int) -> None:
    a, b = torch.full((3, k), left, dtype=torch.int8), torch.full((5, k), right, dtype=torch.int8).t()
    a[0, 0] += 1 if left < 0 else -1
    got = npu.npu_quant_matmul(a, b, torch.ones(1), output_dtype=torch.int32)
    assert torch.equal(got.to(torch.float64), integer_sums(a, b))


def test_a_not_a_number_among_the_token_scales_stays_in_its_row() -> None:
    tokens = torch.tensor([1.0, float("nan"), 1.0])
    got = npu.npu_quant_matmul(
        codes(3, K), weight(K, N), torch.ones(N), pertoken_scale=tokens, output_dtype=torch.float32
    )
    assert got.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pertoken_scale": torch.ones(M)}, "pertoken_scale"),
        ({"pertoken_scale": torch.ones(M), "output_dtype": torch.int32}, "pertoken_scale"),
        ({"bias": torch.ones(N)}, "bias"),
        ({"bias": torch.ones(N), "output_dtype": torch.int32}, "bias"),
        ({"offset": torch.ones(1), "output_dtype": torch.float16}, "offset"),
    ],
)
def test_an_argument_without_effect_is_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        npu.npu_quant_matmul(codes(M, K), weight(K, N), torch.ones(N), **options)


@pytest.mark.parametrize("shape", [(N, 1), (M, 1), (N - 1,)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """[n, 1], as checkpoints store it, would broadcast against [n, n] unnoticed."""
    with pytest.raises(ValueError, match="scale is"):
        npu.npu_quant_matmul(codes(M, K), weight(K, N), torch.ones(shape), output_dtype=torch.float32)


def test_what_the_kernel_does_not_have_is_refused() -> None:
    a, b, scale = codes(M, K), weight(K, N), torch.ones(N)
    for left, right, options in [
        (a, b.to(torch.int32), {}),
        (a, b, {"group_sizes": [1, 1, 32]}),
        (a, b, {"y_scale": scale}),
        (a, b, {"output_dtype": torch.float8_e4m3fn}),
    ]:
        with pytest.raises(NotImplementedError, match="npu_quant_matmul"):
            npu.npu_quant_matmul(left, right, scale, **options)
