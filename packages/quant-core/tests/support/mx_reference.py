"""What FP8 and MX linear types compute, in float64 and by other means than the package."""

import torch
from bits import e2m1
from torch import Tensor


def nearest(values: Tensor, fp4: bool, ties_away: bool) -> Tensor:
    """The nearest E2M1 or E4M3 values, saturated."""
    largest, bits, lowest = (6, 1, 0) if fp4 else (448, 3, -6)
    exponents = (torch.frexp(values).exponent - 1).clamp(min=lowest)
    steps = values / torch.exp2((exponents - bits).to(torch.float64))
    whole = steps.sign() * (steps.abs() + 0.5).floor() if ties_away else steps.round()
    return (whole * torch.exp2((exponents - bits).to(torch.float64))).clamp(-largest, largest)


def microscaled(x: Tensor, fp4: bool, ties_away: bool) -> Tensor:
    """x [..., k] as its blocks of 32 hold it."""
    parts = []
    for block in x.to(torch.float64).split(32, dim=-1):
        peak = block.abs().amax(-1, keepdim=True)
        exponent = torch.where(peak > 0, torch.frexp(peak).exponent - 1 - (2 if fp4 else 8), -127).clamp(min=-127)
        power = torch.exp2(exponent.to(torch.float64))
        parts.append(nearest(block / power, fp4, ties_away) * power)
    return torch.cat(parts, -1)


def stored_weight(stored: dict[str, Tensor]) -> Tensor:
    """Elements times powers of two of a stored module [n, k]."""
    weight = stored["weight"]
    values = (e2m1(weight) if weight.dtype == torch.uint8 else weight).to(torch.float64)
    powers = torch.exp2(stored["weight_scale"].to(torch.float64) - 127)
    return values * powers.repeat_interleave(32, dim=1)[:, : values.shape[1]]


def assert_near(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, slack: float = 1.0) -> None:
    """Equal to x @ weightᵀ + bias up to float32 sums and `slack` roundings to the result's dtype."""
    product = x @ weight.t()
    exact = product + (0 if bias is None else bias.to(torch.float64))
    rounding = torch.finfo(got.dtype).eps / 2 * slack * (product.abs() + exact.abs())
    tolerance = rounding + 2**-19 * (x.abs() @ weight.abs().t()) + 1e-30
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())
