"""Gated activations, and those that are quantised, against formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 64, 65, 130)  # activations are computed by 64 rows


def silu(values: Tensor) -> Tensor:
    """In float64."""
    return values / (1 + (-values).exp())


def clipped(a: Tensor, b: Tensor, alpha: float, limit: float, bias: float) -> Tensor:
    """In float64."""
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return a / (1 + (-alpha * a).exp()) * (b + bias)


def check(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings in float32 and one to the dtype."""
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 48) * 5).to(dtype)
    left, right = x.double().chunk(2, dim=-1)
    check(npu.npu_swiglu(x), silu(left) * right, dtype)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_swiglu_along_any_axis(dim: int) -> None:
    x = torch.randn(4, 6, 8)
    left, right = x.double().chunk(2, dim=dim)
    check(npu.npu_swiglu(x, dim), silu(left) * right, torch.float32)
    turned = x.transpose(0, 2)
    assert torch.equal(npu.npu_swiglu(turned, dim), npu.npu_swiglu(turned.contiguous(), dim))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("constants", [(1.702, 7.0, 1.0), (1.0, 2.5, 0.0)])
def test_clipped_swiglu(constants: tuple[float, ...], interleaved: bool, rows: int, dtype: torch.dtype) -> None:
    alpha, limit, bias = constants
    x = (torch.randn(rows, 48) * 8).to(dtype)
    parts = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, dim=-1)
    got = npu.npu_clipped_swiglu(x, alpha=alpha, limit=limit, bias=bias, interleaved=interleaved)
    a, b = parts[0].double(), parts[1].double()
    check(got, clipped(a, b, alpha, limit, bias), dtype)


@pytest.mark.parametrize("groups", [[2, 0, 1], [0], [6]])
def test_rows_behind_the_groups_are_zero(groups: list[int]) -> None:
    x = torch.randn(2, 3, 8)
    x.view(6, 8)[sum(groups) :] = float("nan")
    got = npu.npu_clipped_swiglu(x, group_index=torch.tensor(groups)).view(6, 4)
    assert torch.equal(got[: sum(groups)], npu.npu_clipped_swiglu(x.view(6, 8)[: sum(groups)]))
    assert not got[sum(groups) :].any()


def test_interleaved_is_the_default_and_halves_must_be_asked_for() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(npu.npu_clipped_swiglu(x), npu.npu_clipped_swiglu(x[:, [0, 2, 1, 3]], interleaved=False))
    assert not torch.equal(npu.npu_clipped_swiglu(x), npu.npu_clipped_swiglu(x, interleaved=False))


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per token to int8, in float64."""
    scale = values.abs().amax(dim=-1) / 127
    return (values / scale[:, None]).nan_to_num(0.0).round(), scale


def check_codes(got: tuple[Tensor, Tensor], exact: Tensor) -> None:
    """The scale to a few roundings, codes to one step where a quotient is close to a tie."""
    codes, scale = quantised(exact)
    assert [t.dtype for t in got] == [torch.int8, torch.float32]
    torch.testing.assert_close(got[1].double(), scale, rtol=1e-5, atol=1e-12)
    distance = (got[0].double() - codes).abs()
    assert distance.max().item() <= 1
    assert distance.mean().item() < 1e-2


GROUPS = {"several": [3, 0, 1, 70], "many small": [2] * 30, "one": [10], "all in the last": [0, 0, 66], "none": [0, 0]}


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("smooth", [False, True])
def test_sums_scaled_activated_and_quantised(smooth: bool, left: bool, case: str) -> None:
    counts = GROUPS[case]
    total, h = sum(counts), 24
    x = torch.randint(-30000, 30000, (total + 2, 2 * h), dtype=torch.int32)
    columns, tokens = torch.rand(len(counts), 2 * h) / 1000, torch.rand(total + 2)
    tokens[total:] = float("nan")
    factors = torch.rand(len(counts), h) + 0.5 if smooth else None
    got = npu.npu_dequant_swiglu_quant(
        x,
        weight_scale=columns,
        activation_scale=tokens,
        quant_scale=factors,
        group_index=torch.tensor(counts),
        activate_left=left,
        quant_mode=1,
    )
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    values = x[:total].double() * columns[experts].double() * tokens[:total, None].double()
    a, b = values.chunk(2, dim=-1) if left else values.chunk(2, dim=-1)[::-1]
    exact = silu(a) * b
    if total:
        check_codes((got[0][:total], got[1][:total]), exact if factors is None else exact * factors[experts].double())
    assert not got[0][total:].any()
    assert not got[1][total:].any()


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("left", [True, False])
def test_clipped_modes(mode: int, left: bool) -> None:
    """Interleaved values, which have no left half; or halves."""
    x, alpha, limit, bias = torch.randn(9, 32) * 5, 1.1, 3.0, 0.5
    got = npu.npu_dequant_swiglu_quant(
        x,
        activate_left=left,
        quant_mode=1,
        swiglu_mode=mode,
        clamp_limit=limit,
        glu_alpha=alpha,
        glu_bias=bias,
    )
    a, b = (x[:, 0::2], x[:, 1::2]) if mode == 1 else x.chunk(2, dim=-1) if left else x.chunk(2, dim=-1)[::-1]
    check_codes(got, clipped(a.double(), b.double(), alpha, limit, bias))


def test_the_default_activates_the_right_half() -> None:
    x = torch.randn(3, 8)
    default = npu.npu_dequant_swiglu_quant(x, quant_mode=1)
    turned = npu.npu_dequant_swiglu_quant(torch.cat([x[:, 4:], x[:, :4]], dim=1), quant_mode=1, activate_left=True)
    assert all(map(torch.equal, default, turned))


def test_one_row_of_scales_and_a_bias() -> None:
    x, scale = torch.randint(-900, 900, (70, 8), dtype=torch.int32), torch.rand(8) / 100
    bias = torch.randint(-900, 900, (8,), dtype=torch.int32)
    given = {"weight_scale": scale, "activation_scale": torch.rand(70, 1), "quant_mode": 1}
    got = npu.npu_dequant_swiglu_quant(x, bias=bias, **given)
    assert all(map(torch.equal, got, npu.npu_dequant_swiglu_quant(x + bias, **given)))


X, WEIGHT_SCALE = torch.ones(3, 8, dtype=torch.int32), torch.ones(1, 8)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"weight_scale": WEIGHT_SCALE, "quant_mode": 0}, NotImplementedError, "quant_mode=0"),
        (X, {}, ValueError, "weight_scale given: False"),
        (X.float(), {"weight_scale": WEIGHT_SCALE}, ValueError, "floating values none"),
        (X, {"weight_scale": WEIGHT_SCALE, "swiglu_mode": 3}, NotImplementedError, "swiglu_mode=3"),
        (
            X,
            {"weight_scale": WEIGHT_SCALE, "bias": X[0], "group_index": torch.tensor([3])},
            ValueError,
            "bias of groups",
        ),
        (X, {"weight_scale": WEIGHT_SCALE, "group_index": torch.tensor([4])}, ValueError, "does not cut 3 rows"),
    ],
)
def test_what_the_kernel_does_not_have_is_refused(
    x: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        npu.npu_dequant_swiglu_quant(x, **{"quant_mode": 1, **options})


def test_an_axis_without_halves_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], axis -1"):
        npu.npu_swiglu(torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="interleaved values on axis 0"):
        npu.npu_clipped_swiglu(torch.ones(2, 4), dim=0)
