"""Products of FP8 and FP4 operands against float64."""

import itertools
from typing import Any

import pytest
import torch
from bits import e2m1, pack_pairs, unpack_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_modules import exponents, fp8
from torch import Tensor

from quant_core import microscaling as mx

npu = torch.ops.npu

FP4 = 296
MX = {"scale_dtype": 293, "pertoken_scale_dtype": 293}


def fp4(rows: int, k: int) -> Tensor:
    """Random FP4 values, packed along k."""
    return torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)


def decoded(codes: Tensor) -> Tensor:
    """As a weight may come too: FP8 as bfloat16, FP4 as int8 with twice the values."""
    if codes.dtype != torch.uint8:
        return codes.to(torch.bfloat16)
    return (2 * e2m1(codes)).to(torch.int8)


def doubles(codes: Tensor) -> Tensor:
    """The values that codes stand for."""
    values = e2m1(codes) if codes.dtype == torch.uint8 else codes.to(torch.float32)
    return values.to(torch.float64)


def scaled(codes: Tensor, powers: Tensor) -> Tensor:
    """With their blocks' powers of two."""
    values = doubles(codes)
    return values * (2.0 ** (powers.to(torch.float64) - 127)).repeat_interleave(32, 1)[:, : values.shape[1]]


def close(got: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Equal to left @ rightᵀ + bias up to float32 sums and one rounding."""
    exact = left @ right.t() + (0 if bias is None else bias.to(torch.float64))
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)  # float16 has subnormal results
    tolerance = rounding + 2**-20 * (left.abs() @ right.abs().t() + 1e-30)
    assert got.dtype == dtype
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


KINDS = {"fp8": (fp8, fp8), "fp8 x fp4": (fp8, fp4), "fp4": (fp4, fp4)}


def microscaled(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, carrier: torch.dtype | None = None, **options: Any
) -> Tensor:
    """The operator's product of x [m, ...] and a weight [n, ...], the dtype of whose codes is told if it is decoded."""
    result: Tensor = npu.npu_quant_matmul(
        x,
        w.t(),
        mx.pair_exponents(w_scale).transpose(0, 1),
        pertoken_scale=mx.pair_exponents(x_scale),
        x1_dtype=FP4 if x.dtype == torch.uint8 else None,
        x2_dtype=FP4 if (carrier or w.dtype) == torch.uint8 else None,
        group_sizes=[1, 1, 32],
        **MX,
        **options,
    )
    return result


@settings(max_examples=60)
@given(
    st.sampled_from(list(KINDS)),
    st.integers(0, 5),
    st.integers(1, 50).map(lambda half: 2 * half),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**30),
)
def test_microscaled(kind: str, m: int, k: int, n: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    """Short last blocks, odd numbers of blocks and no rows included."""
    torch.manual_seed(seed)
    x, w = (make(rows, k) for make, rows in zip(KINDS[kind], (m, n), strict=True))
    x_scale, w_scale = exponents(m, k, 118), exponents(n, k, 118)
    added = torch.randn(n) if bias else None
    got = microscaled(x, w, x_scale, w_scale, bias=added, output_dtype=dtype)
    close(got, scaled(x, x_scale), scaled(w, w_scale), added, dtype)
    of_values = microscaled(x, decoded(w), x_scale, w_scale, w.dtype, bias=added, output_dtype=dtype)
    torch.testing.assert_close(of_values, got, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [0, 1, 253, 254])
def test_a_decoded_weight_has_the_same_extremes(kind: str, power: int) -> None:
    """The largest power of two times twice a value would be infinite; half of the smallest one is subnormal."""
    x, w = (make(3, 64) for make in KINDS[kind])
    x_scale, w_scale = torch.full((3, 2), 254 - power, dtype=torch.uint8), torch.full((3, 2), power, dtype=torch.uint8)
    got = microscaled(x, w, x_scale, w_scale, output_dtype=torch.float32)
    of_values = microscaled(x, decoded(w), x_scale, w_scale, w.dtype, output_dtype=torch.float32)
    torch.testing.assert_close(of_values, got, rtol=0, atol=0, equal_nan=True)
    ones = torch.full((1, 32), 0x22, dtype=torch.uint8) if w.dtype == torch.uint8 else torch.ones(1, 64).to(w.dtype)
    x = torch.full((1, 32), 0x22, dtype=torch.uint8) if x.dtype == torch.uint8 else torch.ones(1, 64).to(x.dtype)
    got = microscaled(x, decoded(ones), x_scale[:1], w_scale[:1], w.dtype, output_dtype=torch.float32)
    assert got.tolist() == [[64.0]]


def test_fp4_weights_packed_along_the_output_features() -> None:
    x, w = fp4(3, 96), fp4(10, 96)
    x_scale, w_scale = exponents(3, 96, 118), exponents(10, 96, 118)
    along_n = pack_pairs(unpack_pairs(w, 1).t(), 1).view(torch.uint8)
    options = {"pertoken_scale": mx.pair_exponents(x_scale), "x1_dtype": FP4, "x2_dtype": FP4, **MX}
    scale = mx.pair_exponents(w_scale).transpose(0, 1)
    got = npu.npu_quant_matmul(x, along_n, scale, output_dtype=torch.float32, **options)
    close(got, scaled(x, x_scale), scaled(w, w_scale), None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("k", [33, 64])
def test_fp8_per_token(k: int, one_scale: bool, per_token: bool, dtype: torch.dtype) -> None:
    x, w, bias = fp8(5, k), fp8(24, k), torch.randn(24)
    scale, rows = torch.rand(1 if one_scale else 24), torch.rand(5) if per_token else None
    got = npu.npu_quant_matmul(x, w.t(), scale, pertoken_scale=rows, bias=bias, output_dtype=dtype)
    left = doubles(x) * (1 if rows is None else rows.to(torch.float64)[:, None])
    close(got, left, doubles(w) * scale.to(torch.float64).view(-1, 1), bias, dtype)
    of_values = npu.npu_quant_matmul(x, decoded(w).t(), scale, pertoken_scale=rows, bias=bias, output_dtype=dtype)
    assert torch.equal(of_values, got)


def test_a_large_weight_goes_in_parts() -> None:
    """Of an odd number of input features too, for which there is no pair of values to look up."""
    for k, m in itertools.product((4096, 4097), (1, 2)):
        x, w = fp8(m, k), fp8(600, k)
        got = npu.npu_quant_matmul(x, w.t(), torch.ones(1), output_dtype=torch.float32)
        close(got, doubles(x), doubles(w), None, torch.float32)


@pytest.mark.parametrize("k", [64, 512, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carrier", [torch.uint8, torch.int8])
def test_two_levels(k: int, dtype: torch.dtype, carrier: torch.dtype) -> None:
    x, w, bias, groups = fp4(3, k), fp4(24, k), torch.randn(24), -(-k // 512)
    x0, w0 = torch.rand(3, groups), torch.rand(24, groups)
    x1, w1 = exponents(3, k, 124), exponents(24, k, 124)
    got, of_values = (
        npu.npu_dual_level_quant_matmul(
            x.view(carrier),
            weight,
            x0,
            w0.t().contiguous(),
            mx.pair_exponents(x1),
            mx.pair_exponents(w1),
            bias=bias,
            output_dtype=dtype,
        )
        for weight in (w.view(carrier), decoded(w))
    )
    assert torch.equal(of_values, got)
    left, right = (
        scaled(codes, powers) * level0.to(torch.float64).repeat_interleave(512, 1)[:, :k]
        for codes, powers, level0 in ((x, x1, x0), (w, w1, w0))
    )
    close(got, left, right, bias, dtype)


def mx_call(**changes: Any) -> Tensor:
    """A product that works, with changes."""
    arguments: dict[str, Any] = {
        "x1": fp8(3, 64),
        "x2": fp8(8, 64).t(),
        "scale": torch.full((1, 8, 2), 127, dtype=torch.uint8),
        "pertoken_scale": torch.full((3, 1, 2), 127, dtype=torch.uint8),
        "output_dtype": torch.float32,
        **MX,
    }
    return npu.npu_quant_matmul(**{**arguments, **changes})


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no output": ({"output_dtype": None}, NotImplementedError, "output None"),
    "batches": ({"x1": fp8(6, 64).view(2, 3, 64)}, NotImplementedError, "the CPU kernel has no"),
    "one side": ({"scale_dtype": None}, NotImplementedError, "E8M0 scales"),
    "groups": ({"group_sizes": [1, 128, 128]}, NotImplementedError, "group_sizes"),
    "carrier": ({"x1": torch.zeros(3, 64, dtype=torch.uint8)}, NotImplementedError, "no operand torch.uint8"),
    "activations that are no codes": (
        {"x1": torch.zeros(3, 64, dtype=torch.bfloat16)},
        NotImplementedError,
        "no operand",
    ),
    "a weight of another float": ({"x2": torch.zeros(64, 8, dtype=torch.float16)}, NotImplementedError, "no operand"),
    "int8 without a word": ({"x2": torch.zeros(64, 8, dtype=torch.int8)}, NotImplementedError, "no operand torch.int8"),
    "decoded features": ({"x2": torch.zeros(32, 8, dtype=torch.int8), "x2_dtype": FP4}, ValueError, "has no 64"),
    "features": ({"x2": fp8(8, 32).t()}, ValueError, "has no 64 input features"),
    "scales": ({"scale": torch.ones(2, 8, 2, dtype=torch.uint8)}, ValueError, "expected"),
    "offset": ({"offset": torch.ones(1)}, NotImplementedError, "the CPU kernel has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_have_is_refused(name: str) -> None:
    changes, error, message = REFUSED[name]
    assert mx_call().shape == (3, 8)
    with pytest.raises(error, match=message):
        mx_call(**changes)


def test_level_scales_that_do_not_fit_are_refused() -> None:
    ones = torch.ones(3, 1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expected \[\[8, 32\], \[3, 1\], \[1, 8\], \[3, 1, 2\], \[8, 1, 2\]\]"):
        npu.npu_dual_level_quant_matmul(fp4(3, 64), fp4(8, 64), torch.ones(3, 1), torch.ones(8, 1), ones, ones)
