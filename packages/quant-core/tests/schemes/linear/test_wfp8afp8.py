"""WFP8AFP8: FP8 with scales of the input that are stored."""

from typing import Any

import pytest
import torch
from float_modules import fp8_module, fp8_static
from mx_reference import assert_near, nearest
from torch import Tensor

from quant_core import LimitError
from quant_core.schemes.linear.wfp8afp8 import AscendWFP8AFP8LinearMethod as Static
from quant_core.schemes.linear.wfp8afp8_dynamic import AscendW8A8FP8DynamicLinearMethod as Dynamic

INPUTS, SIZES = 72, (24, 5, 11)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """What static codes stand for, in float64; the quotient is a float32 one."""
    quotients = (x.to(torch.float32) / scale.to(torch.float32)).to(torch.float64)
    return nearest(quotients, fp4=False, ties_away=False) * scale.to(torch.float64)


def weight_of(stored: dict[str, Tensor]) -> Tensor:
    """q · weight_scale in float64, whatever shape the scale has."""
    return stored["weight"].to(torch.float64) * stored["weight_scale"].to(torch.float64)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [(0.02, 0.02, 0.02), (0.02, 0.03, 0.03), (0.01, 0.02, 0.01)])
def test_the_formula(workbench: Any, strategy: str, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """Of members with one input scale and with several; values beyond 448 of them saturate."""
    members = [fp8_static(out, INPUTS, strategy, input_scale=s) for out, s in zip(SIZES, scales, strict=True)]
    scheme, layer = workbench.serve(Static, members, dtype=dtype)
    x, bias = (torch.randn(9, INPUTS) * 4).to(dtype), torch.randn(sum(SIZES)).to(dtype)
    x[0, 0], x[1] = 100, 0
    got = scheme.apply(layer, x, bias).split(SIZES, -1)
    for member, part, added in zip(members, got, bias.split(SIZES), strict=True):
        assert_near(part, rounded(x, member["input_scale"]), weight_of(member), added)
    assert len(layer.get_parameter("input_scale")) == len(dict.fromkeys(scales)) + (scales[0] == scales[2] != scales[1])


@pytest.mark.parametrize("strategy", ["tensor", "scalar"])
def test_one_weight_scale_for_a_member(workbench: Any, strategy: str) -> None:
    """Each member of a fused layer has its own, on any rank."""
    members = [fp8_module(out, INPUTS, strategy) for out in SIZES]
    scheme, layer = workbench.serve(Dynamic, members)
    assert layer.get_parameter("weight_scale").shape == (sum(SIZES),)
    x = (torch.randn(5, INPUTS) * 40).to(torch.float8_e4m3fn).to(torch.float32)
    x[:, 0] = 448
    weight = torch.cat([weight_of(member) for member in members])
    assert_near(scheme.apply(layer, x), x.to(torch.float64), weight)
    members = [fp8_static(2 * out, INPUTS, strategy, input_scale=0.01 * out) for out in SIZES]
    x = torch.randn(5, INPUTS)
    scheme, layer = workbench.serve(Static, members)
    whole = scheme.apply(layer, x)
    for kind in ("column", "row"):
        torch.testing.assert_close(workbench.run_ranks(Static, members, x, kind, 2), whole)


def test_a_reload_may_not_change_which_members_share_an_input_scale(workbench: Any) -> None:
    """Compiled code has the runs."""
    alike, unlike = ([fp8_static(8, INPUTS, input_scale=0.01 * (1 + n * i)) for i in range(2)] for n in (0, 1))
    scheme, _ = workbench.serve(Static, alike)
    with pytest.raises(LimitError, match="share their input scales among other members than before"):
        scheme.process_weights_after_loading(workbench.load(scheme, unlike))
    scheme, layer = workbench.serve(Static, alike, values_later=True)
    assert len(layer.get_parameter("input_scale")) == 2
    scheme.process_weights_after_loading(workbench.load(scheme, unlike))


def test_what_is_stated_otherwise_is_refused(workbench: Any) -> None:
    dynamic = workbench.context([fp8_module(8, INPUTS, "tensor")], scheme_class=Static)
    assert Static.can_serve(dynamic) == []
    stated = workbench.context([fp8_static(8, INPUTS)], scheme_class=Dynamic)
    (reason,) = Dynamic.can_serve(stated)
    assert "has no such activations" in reason
    blocks = workbench.context([fp8_module(8, INPUTS, "block")], scheme_class=Static)
    assert "scales per block" in Static.can_serve(blocks)[0]
