"""W8A8_MIX: one of its two types serves, by the instance's role."""

from typing import Any

import pytest
import torch
from linear_cases import w8a8_mix
from torch import Tensor

from quant_core import Partition
from quant_core.schemes.linear.w8a8_mix import AscendW8A8MixLinearMethod

INPUTS = 64
SIZES = (24, 8)
STATIC = {"weight", "input_scale", "input_offset", "deq_scale", "quant_bias"}


def static(x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """(a qᵀ + quant_bias) · deq_scale in float64, the bias being inside quant_bias."""
    scale, offset = (stored[name].double() for name in ("input_scale", "input_offset"))
    codes = torch.round(x.double() / scale + offset).clamp(-128, 127)
    return (codes @ stored["weight"].double().t() + stored["quant_bias"]) * stored["deq_scale"].double()


def dynamic(x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """(a qᵀ) · x_scale · weight_scale in float64."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return torch.round(x.double() / scale) @ stored["weight"].double().t() * scale * stored["weight_scale"][:, 0]


def inputs() -> Tensor:
    """Multiples of 1/32, each row's largest being 127 of them: no code of either type depends on rounding."""
    codes = torch.randint(-126, 127, (5, INPUTS))
    codes[:, 0] = 127
    return codes / 32


@pytest.mark.usefixtures("each_gemm")
@pytest.mark.parametrize("role", ["both", "prefill", "decode"])
@pytest.mark.parametrize("kind", ["replicated", "column"])
def test_the_formula_of_the_role(workbench: Any, role: str, kind: Any) -> None:
    """Static where an instance only decodes; a bias is added by the dynamic type and is inside the static one."""
    members = [{**w8a8_mix(size, INPUTS), "input_scale": torch.tensor([2**-5])} for size in SIZES]
    x, bias = inputs(), torch.randn(sum(SIZES))
    if role == "decode":
        expected = torch.cat([static(x, member) for member in members], dim=1)
    else:
        expected = torch.cat([dynamic(x, member) for member in members], dim=1) + bias
    found = []
    for rank in range(2):
        partition = Partition(kind, rank, 2)
        scheme, layer = workbench.serve(AscendW8A8MixLinearMethod, members, role=role, partition=partition)
        assert scheme.folds_bias == (role == "decode")
        assert set(dict(layer.named_parameters())) == (STATIC if role == "decode" else {"weight", "weight_scale"})
        own = torch.cat([part.chunk(2)[rank] for part in bias.split(SIZES)]) if kind == "column" else bias
        found.append(scheme.apply(layer, x, own, tp_rank=rank).double())
    parts = [y.split([size // 2 for size in SIZES], dim=1) for y in found] if kind == "column" else [found[:1]]
    whole = torch.cat([torch.cat(member, dim=1) for member in zip(*parts, strict=True)], dim=1)
    torch.testing.assert_close(whole, expected, rtol=2**-20, atol=1e-4)


def test_the_two_types_can_be_told_apart() -> None:
    """Otherwise the test above would not see which one serves."""
    stored, x = {**w8a8_mix(24, INPUTS), "input_scale": torch.tensor([2**-5])}, inputs()
    assert (static(x, stored) - dynamic(x, stored)).abs().max() > 1


def test_a_bias_beside_it_stays(workbench: Any) -> None:
    stored = w8a8_mix(8, 64)
    scheme = AscendW8A8MixLinearMethod.create(
        workbench.context([stored], has_bias=True, scheme_class=AscendW8A8MixLinearMethod)
    )
    layer = workbench.load(scheme, [stored])
    layer.register_parameter("bias", torch.nn.Parameter(torch.ones(8), requires_grad=False))
    scheme.process_weights_after_loading(layer)
    assert set(dict(layer.named_parameters())) == {"weight", "weight_scale", "bias"}
