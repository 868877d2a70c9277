"""W8A8_MIX: one of its two types serves, by the instance's role."""

from typing import Any

import pytest
import torch
from linear_cases import w8a8_mix

from quant_core import AscendLinearScheme
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.linear.w8a8_mix import AscendW8A8MixLinearMethod


@pytest.mark.parametrize(
    ("role", "same"),
    [
        ("both", AscendW8A8DynamicLinearMethod),
        ("prefill", AscendW8A8DynamicLinearMethod),
        ("decode", AscendW8A8LinearMethod),
    ],
)
def test_it_is_the_type_that_the_role_wants(workbench: Any, role: str, same: type[AscendLinearScheme]) -> None:
    """Same output, same tensors kept, same place for the bias."""
    stored = w8a8_mix(24, 64)
    mixed, layer = workbench.serve(AscendW8A8MixLinearMethod, [stored], role=role)
    dynamic = {name: stored[name] for name in ("weight", "weight_scale", "weight_offset")}
    other, expected = workbench.serve(same, [stored if role == "decode" else dynamic])
    x, bias = torch.randn(5, 64), torch.randn(24)
    assert torch.equal(mixed.apply(layer, x, bias), other.apply(expected, x, bias))
    assert mixed.folds_bias == other.folds_bias
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}


def test_a_bias_beside_it_stays(workbench: Any) -> None:
    stored = w8a8_mix(8, 64)
    scheme = AscendW8A8MixLinearMethod.create(
        workbench.context([stored], has_bias=True, scheme_class=AscendW8A8MixLinearMethod)
    )
    layer = workbench.load(scheme, [stored])
    layer.register_parameter("bias", torch.nn.Parameter(torch.ones(8), requires_grad=False))
    scheme.process_weights_after_loading(layer)
    assert set(dict(layer.named_parameters())) == {"weight", "weight_scale", "bias"}
