"""npu_weight_quant_batchmatmul against the formula in float64."""

import pytest
import torch
from bits import pack_eights
from torch import Tensor

npu = torch.ops.npu

M, K, N = 7, 80, 24
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def codes(*shape: int) -> Tensor:
    """Random int8 values with both extremes among them."""
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    values.flatten()[:2] = torch.tensor([127, -128], dtype=torch.int8)
    return values


def exact_weight(weight: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(w + offset) · scale in float64, rounded to x's dtype after each step, as the device does."""
    values = weight.to(torch.float64)
    if offset is not None:
        values = (values + offset.to(torch.float64)).to(dtype).to(torch.float64)
    return (values * scale.to(torch.float64)).to(dtype).to(torch.float64)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Equal to x @ weight + bias up to float32 sums and one rounding to x's dtype."""
    exact = x.to(torch.float64) @ weight + (0 if bias is None else bias.to(torch.float64))
    magnitude = x.to(torch.float64).abs() @ weight.abs() + exact.abs()
    tolerance = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-21 * magnitude
    assert (got.dtype, got.shape) == (x.dtype, exact.shape)
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (N,), (1, N)])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_per_channel(dtype: torch.dtype, shape: tuple[int, ...], offset: bool, bias: bool) -> None:
    x, weight = torch.randn(M, K).to(dtype), codes(N, K).t()
    scale = (torch.rand(shape) / 100 + 1e-3).to(dtype)
    added = torch.randint(-128, 128, shape).to(dtype) if offset else None
    # The device wants a float32 bias beside bfloat16.
    b = torch.randn(N).to(torch.float32 if dtype == torch.bfloat16 else dtype) if bias else None
    got = npu.npu_weight_quant_batchmatmul(x, weight, scale, added, bias=b)
    check(got, x, exact_weight(weight, scale, added, dtype), b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [16, 32, 40])  # 80 is no multiple of 32: the last group is shorter
@pytest.mark.parametrize("offset", [False, True])
def test_per_group(dtype: torch.dtype, group: int, offset: bool) -> None:
    x, weight = torch.randn(M, K).to(dtype), codes(N, K).t()
    groups = -(-K // group)
    scale = (torch.rand(groups, N) / 100 + 1e-3).to(dtype)
    added = torch.randint(-128, 128, (groups, N)).to(dtype) if offset else None
    got = npu.npu_weight_quant_batchmatmul(x, weight, scale, added, antiquant_group_size=group)
    row_group = torch.arange(K) // group
    exact = exact_weight(weight, scale[row_group], None if added is None else added[row_group], dtype)
    check(got, x, exact, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("along", ["k", "n"])
@pytest.mark.parametrize("group", [0, 40])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_int4_in_int32_is_the_same_in_int8(dtype: torch.dtype, along: str, group: int, tokens: int) -> None:
    """Packed along n as it lies, or along k and transposed; the shape tells, also where the strides do not."""
    x, weight = torch.randn(tokens, K).to(dtype), torch.randint(-8, 8, (K, N), dtype=torch.int8)
    shape = (K // group, N) if group else (N,)
    scale, offset = (torch.rand(shape) / 10 + 0.01).to(dtype), torch.randint(-8, 8, shape).to(dtype)
    packed = pack_eights(weight) if along == "n" else pack_eights(weight.t()).t()
    weight = weight if along == "n" else weight.t().contiguous().t()  # float32 sums depend on how a matrix lies
    options = {"bias": torch.randn(N).to(dtype), "antiquant_group_size": group}
    want = npu.npu_weight_quant_batchmatmul(x, weight, scale, offset, **options)
    for form in (packed, packed.contiguous()):
        torch.testing.assert_close(
            npu.npu_weight_quant_batchmatmul(x, form, scale, offset, **options), want, rtol=0, atol=0
        )


def test_the_offset_is_added() -> None:
    """Formats that subtract theirs must negate it."""
    got = npu.npu_weight_quant_batchmatmul(
        torch.ones(1, 1), torch.tensor([[10]], dtype=torch.int8), torch.tensor([2.0]), torch.tensor([3.0])
    )
    assert got.item() == 26


@pytest.mark.parametrize("offset", [0.0, 128.0, -128.0, 129.0, 300.0, 0.3, -77.5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_offsets_are_rounded_where_a_dtype_has_no_such_sum(dtype: torch.dtype, offset: float) -> None:
    x, weight, scale = torch.randn(M, K).to(dtype), codes(N, K).t(), (torch.rand(N) / 100).to(dtype)
    added = torch.full((N,), offset).to(dtype)
    got = npu.npu_weight_quant_batchmatmul(x, weight, scale, added)
    check(got, x, exact_weight(weight, scale, added, dtype), None)


def test_quantised_output() -> None:
    x, weight, scale = torch.randn(M, K), codes(N, K).t(), torch.rand(N) / 100
    quant_scale, quant_offset = torch.rand(N) * 10, torch.randint(-9, 9, (N,)).to(torch.float32)
    got = npu.npu_weight_quant_batchmatmul(x, weight, scale, None, quant_scale, quant_offset)
    exact = (x.to(torch.float64) @ exact_weight(weight, scale, None, torch.float32)) * quant_scale + quant_offset
    assert got.dtype == torch.int8
    assert (got - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-3
    one = npu.npu_weight_quant_batchmatmul(x, weight, scale, None, quant_scale[:1])
    assert torch.equal(one, npu.npu_weight_quant_batchmatmul(x, weight, scale, None, quant_scale[:1].expand(N)))


@pytest.mark.parametrize("shape", [(0, K), (1, K), (33000, K)])
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    x, weight, scale = torch.randn(shape).to(torch.bfloat16), codes(8, K).t(), torch.rand(8).to(torch.bfloat16)
    got = npu.npu_weight_quant_batchmatmul(x, weight, scale)
    assert got.shape == (*shape[:-1], 8)
    check(got, x, exact_weight(weight, scale, None, torch.bfloat16), None)


def test_what_the_kernel_does_not_have_is_refused() -> None:
    x, weight, scale = torch.randn(M, K), codes(K, N), torch.ones(N)
    with pytest.raises(NotImplementedError, match="int16"):
        npu.npu_weight_quant_batchmatmul(x, weight.to(torch.int16), scale)
    with pytest.raises(ValueError, match=r"\[9, 24\] has not 80 input features"):
        npu.npu_weight_quant_batchmatmul(x, weight[:9].to(torch.int32), scale)
    with pytest.raises(NotImplementedError):
        npu.npu_weight_quant_batchmatmul(x, weight, scale, weight_dtype=296)
    with pytest.raises(ValueError, match=r"\[1, 3, 80\]"):
        npu.npu_weight_quant_batchmatmul(torch.randn(1, 3, K), weight, scale)


@pytest.mark.parametrize("wrong", ["scale", "offset"])
def test_scales_in_another_dtype_than_x_are_refused(wrong: str) -> None:
    """The device refuses them; here they would only make the weight less rounded."""
    x = torch.randn(M, K).to(torch.bfloat16)
    dtypes = {"scale": torch.bfloat16, "offset": torch.bfloat16, wrong: torch.float32}
    scale, offset = torch.ones(N, dtype=dtypes["scale"]), torch.zeros(N, dtype=dtypes["offset"])
    with pytest.raises(ValueError, match="bfloat16"):
        npu.npu_weight_quant_batchmatmul(x, codes(K, N), scale, offset)
