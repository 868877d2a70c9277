"""Activations quantised per token with an offset, against formulas in float64."""

import pytest
import torch
from bits import unpack_eights
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

npu = torch.ops.npu


def check(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, maximum: int) -> None:
    """Scale and offset up to float32, codes up to what that can shift across a tie; the extremes are reached."""
    exact = x.to(torch.float64)
    low, high = exact.amin(-1), exact.amax(-1)
    want = ((high - low) / (2 * maximum + 1)).clamp(min=1e-12)
    torch.testing.assert_close(scale.to(torch.float64), want, rtol=2**-22, atol=0)
    shift = maximum - high / want
    torch.testing.assert_close(offset.to(torch.float64), shift, rtol=2**-20, atol=2**-15)
    nearest = (exact / want[..., None] + shift[..., None]).clamp(-maximum - 1, maximum)
    slack = 1e-3 + 2**-20 * float(shift.abs().max())
    assert bool(((codes.to(torch.float64) - nearest).abs() <= 0.5 + slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (128, 8), (129, 8), (2, 3, 64), (0, 8)])
@pytest.mark.parametrize("shift", [0.0, 3.0, -20.0])
def test_the_whole_range_is_used(dtype: torch.dtype, shape: tuple[int, ...], shift: float) -> None:
    """Also of a token whose values have all one sign."""
    x = (torch.randn(shape) + shift).to(dtype)
    codes, scale, offset = npu.npu_dynamic_quant_asymmetric(x)
    assert (codes.shape, codes.dtype) == (shape, torch.int8)
    assert {(t.shape, t.dtype) for t in (scale, offset)} == {(shape[:-1], torch.float32)}
    if len(x):
        check(x, codes, scale, offset, 127)
        assert bool((codes.amax(-1) == 127).all())
        assert bool((codes.amin(-1) == -128).all())


def test_int4_is_packed_eight_to_an_int32() -> None:
    x = torch.randn(5, 16).to(torch.bfloat16)
    packed, scale, offset = npu.npu_dynamic_quant_asymmetric(x, dst_type=torch.quint4x2)
    codes = unpack_eights(packed)
    assert codes.shape == x.shape
    check(x, codes, scale, offset, 7)
    with pytest.raises(ValueError, match="eights"):
        npu.npu_dynamic_quant_asymmetric(torch.randn(4, 12), dst_type=torch.quint4x2)


def test_smooth_scales_are_multiplied_first() -> None:
    x, smooth = torch.randn(9, 16).to(torch.bfloat16), torch.rand(16).to(torch.bfloat16)
    found = npu.npu_dynamic_quant_asymmetric(x, smooth_scales=smooth)
    check(x.to(torch.float64) * smooth.to(torch.float64), *found, 127)


def test_tokens_whose_values_are_all_the_same_come_back() -> None:
    """The smallest scale keeps them from being divided by zero; their offset is large then."""
    x = torch.tensor([[0.0], [10.0], [-3.0]]).expand(3, 8)
    codes, scale, offset = npu.npu_dynamic_quant_asymmetric(x)
    assert scale.tolist() == [pytest.approx(1e-12)] * 3
    torch.testing.assert_close((codes - offset[:, None]) * scale[:, None], x)
    assert not ((codes - offset[:, None]) * scale[:, None])[0].any()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=20))
def test_half_a_step_is_lost_at_most(values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    spread = float(x.max() - x.min())
    assume(spread > 1e-9)
    assume(spread > 1e-3 * float(x.abs().max()))  # a narrow range far from zero needs more digits than float32 has
    codes, scale, offset = npu.npu_dynamic_quant_asymmetric(x)
    back = (codes.to(torch.float64) - offset.to(torch.float64)) * scale.to(torch.float64)
    assert (back - x.to(torch.float64)).abs().max() <= scale.to(torch.float64).item() * (0.5 + 0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"group_index": torch.tensor([4])},
        {"quant_mode": "pertensor"},
        {"dst_type": torch.qint32},
        {"dst_type_max": 7.0},
    ],
)
def test_what_it_does_not_have_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="npu_dynamic_quant_asymmetric"):
        npu.npu_dynamic_quant_asymmetric(torch.randn(4, 8), **options)
    with pytest.raises(ValueError, match="two axes"):
        npu.npu_dynamic_quant_asymmetric(torch.randn(8))
