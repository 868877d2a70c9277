"""W8A8 where the writer left the input's scale, the zero point and the bias apart from the weight."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from integer_modules import ASYMMETRIC_STATIC, STATIC, exact_weight, integers, unfolded
from stating import Stated
from torch import Tensor

from quant_core import LayerQuant, LayerQuery, LimitError, LinearSizes, Partition, UnsupportedSchemeError, create_scheme
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod as Method
from quant_core.schemes.verify import check_values, linear_params, verify_stored

INPUTS, BF16, F16, F32 = 64, torch.bfloat16, torch.float16, torch.float32


def exact_output(x: Tensor, module: Stated) -> Tensor:
    """(Σ q_x q_w - z_x Σ q_w) · s_x · s_w in float64, without the bias."""
    scale = module["input_scale"].to(torch.float64).reshape(())
    offset = module.get("input_offset", torch.zeros(())).to(torch.float64).reshape(())
    codes = torch.round(x.to(torch.float64) / scale + offset).clamp(-128, 127)
    weight, _, weight_scale = exact_weight(module)
    return (codes @ weight.t() - offset * weight.sum(1)) * scale * weight_scale[:, 0]


def check(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Equal up to so many roundings to the output's dtype; float16's scale has 10 bits of mantissa."""
    rtol = torch.finfo(got.dtype).eps / 2 * roundings + 2**-20 + (2**-10 if got.dtype == F16 else 0)
    atol = 1e-5 if got.dtype == F32 else float(exact.abs().max()) * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.to(torch.float64), exact, rtol=rtol, atol=atol)


def inputs(tokens: int, dtype: torch.dtype) -> Tensor:
    """Multiples of powers of two, so that codes are exact; saturation included."""
    return (torch.randint(-300, 300, (tokens, INPUTS)) / 64).to(dtype)


@pytest.mark.usefixtures("each_gemm")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("offset", [None, -128, -7, 127])
def test_the_formula(workbench: Any, dtype: torch.dtype, strategy: str, scalar: bool, offset: int | None) -> None:
    """Members have input scales of their own, scales have the model's dtype, and the bias is added in float."""
    members = [
        unfolded(out, INPUTS, strategy, offset is not None, dtype, scalar, input_scale, offset or 0)
        for out, input_scale in ((24, 2**-5), (8, 2**-5), (16, 2**-6))
    ]
    scheme, layer = workbench.serve(Method, members, dtype=dtype, has_bias=True)
    verify_stored(scheme)
    assert not scheme.folds_bias
    x, bias = inputs(9, dtype), (torch.randn(48) * 3).to(dtype)
    exact = torch.cat([exact_output(x, member) for member in members], dim=-1)
    check(scheme.apply(layer, x), exact)
    check(scheme.apply(layer, x, bias), exact + bias.to(torch.float64), roundings=2)
    assert len(layer.input_scale) == 2
    assert hasattr(layer, "input_offset") == hasattr(layer, "quant_bias") == (offset is not None)


def test_the_bias_of_a_symmetric_layer_goes_to_the_operator(workbench: Any) -> None:
    """So it is added before the one rounding to the model's dtype."""
    module = unfolded(24, INPUTS, input_scale=2**-5)
    scheme, layer = workbench.serve(Method, [module], dtype=BF16)
    x, bias = inputs(9, BF16), (torch.randn(24) * 3).to(BF16)
    exact = exact_output(x, module) + bias.to(torch.float64)
    torch.testing.assert_close(scheme.apply(layer, x, bias).to(torch.float64), exact, rtol=2**-8 + 2**-20, atol=1e-5)


def test_the_correction_is_exact(workbench: Any) -> None:
    """For as many input features as a model of today has, with the largest codes."""
    module = unfolded(8, 65536, "tensor", True, F32, input_offset=-128)
    module["weight"] = torch.full((8, 65536), -128, dtype=torch.int8)
    _, layer = workbench.serve(Method, [module])
    assert layer.quant_bias.tolist() == [-(128 * 128 * 65536)] * 8


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up(workbench: Any, asymmetric: bool, size: int) -> None:
    """A row-parallel rank corrects for its own columns; the bias is what the engine gives to the first one."""
    members = [unfolded(16, INPUTS, asymmetric=asymmetric, input_scale=2**-5) for _ in range(2)]
    x = inputs(5, F32)
    exact = torch.cat([exact_output(x, member) for member in members], dim=-1)
    for kind in ("row", "column"):
        check(workbench.run_ranks(Method, members, x, kind, size), exact)
    bias, total = torch.randn(32), torch.zeros(5, 32)
    for rank, part in enumerate(x.chunk(size, -1)):
        scheme, layer = workbench.serve(Method, members, partition=Partition("row", rank, size))
        total += scheme.apply(layer, part, bias if rank == 0 else None, tp_rank=rank)
    check(total, exact + bias.to(torch.float64))


@pytest.mark.parametrize("asymmetric", [True, False])
def test_both_stored_forms_become_the_same_tensors(workbench: Any, asymmetric: bool) -> None:
    """What is folded by hand, of a layer without a bias, to the last bit; and the same outputs."""
    members = [unfolded(out, INPUTS, asymmetric=asymmetric, input_scale=0.03, input_offset=-9) for out in (24, 8)]
    folded = []
    for member in members:
        offset = member.get("input_offset", torch.zeros(1, dtype=torch.int8))
        sums = member["weight"].sum(1, dtype=torch.int32)
        folded.append(
            {
                "weight": member["weight"],
                "input_scale": member["input_scale"].to(F32),
                "input_offset": offset.to(F32),
                "deq_scale": member["input_scale"].to(F32) * member["weight_scale"].to(F32).flatten(),
                "quant_bias": -offset.to(torch.int32) * sums,
            }
        )
    for dtype in (F32, BF16, F16):
        scheme, layer = workbench.serve(Method, members, dtype=dtype)
        usual, other = workbench.serve(Method, folded, dtype=dtype)
        held, expected = dict(layer.named_parameters()), dict(other.named_parameters())
        assert expected.keys() - held.keys() == (set() if asymmetric else {"input_offset", "quant_bias"})
        for name, value in held.items():
            assert torch.equal(value, expected[name]), name
            assert (value.dtype, value.stride()) == (expected[name].dtype, expected[name].stride())
        x = torch.randn(5, INPUTS).to(dtype)
        assert torch.equal(scheme.apply(layer, x), usual.apply(other, x))


def test_dequantised_it_is_the_weight_alone(workbench: Any) -> None:
    module = unfolded(24, INPUTS, "tensor", True)
    scheme = Method.create(workbench.context([module]))
    codes, _, scale = exact_weight(module)
    found = scheme.dequantize(workbench.load(scheme, [module]))
    torch.testing.assert_close(found.to(torch.float64), codes * scale)
    with pytest.raises(NotImplementedError, match="needs calibration"):
        scheme.quantize(found)


@pytest.mark.parametrize("values_later", [True, False])
def test_a_reload_may_not_change_who_shares_a_scale(workbench: Any, values_later: bool) -> None:
    alike = [unfolded(8, INPUTS, asymmetric=True) for _ in range(2)]
    scheme, layer = workbench.serve(Method, alike, values_later=values_later)
    assert len(layer.input_scale) == (2 if values_later else 1)
    different = [unfolded(8, INPUTS, asymmetric=True, input_scale=scale) for scale in (2**-5, 2**-4)]
    again = workbench.load(scheme, different)
    if values_later:
        scheme.process_weights_after_loading(again)
        return
    with pytest.raises(LimitError, match="share their input scales among other members"):
        scheme.process_weights_after_loading(again)


def test_zero_points_of_symmetric_inputs_are_zero(workbench: Any) -> None:
    """Some writers store them."""
    module = unfolded(8, INPUTS, input_scale=2**-5)
    stored = module.changed(
        input_offset=torch.zeros(1, dtype=torch.int8), weight_offset=torch.zeros(8, 1, dtype=torch.int8)
    )
    scheme, layer = workbench.serve(Method, [stored])
    x = inputs(3, F32)
    check(scheme.apply(layer, x), exact_output(x, module))
    assert set(dict(layer.named_parameters())) == {"weight", "input_scale", "deq_scale"}
    scheme = Method.create(workbench.context([stored]))
    for name in ("input_offset", "weight_offset"):
        with pytest.raises(Exception, match="not zero: the type is symmetric"):
            check_values("l", [f"m.{name}"], linear_params(scheme)[name][0], stored[name] + 1)


def test_what_it_does_not_take_is_said(workbench: Any) -> None:
    """Dynamic inputs, groups and asymmetric weights are other types."""

    def reason(module: Stated, **stated: Any) -> str:
        changed = Stated(module, module.weight, replace(module.input, **stated))
        form = workbench.form("m0", changed)
        query = LayerQuery("l", sizes=LinearSizes(INPUTS, (8,)))
        with pytest.raises(UnsupportedSchemeError) as raised:
            create_scheme(query, LayerQuant("W8A8", ("m0",), (form,), evidence=()))
        return str(raised.value)

    module = unfolded(8, INPUTS)
    assert "such activations" in reason(module, dynamic=True)
    assert "such activations" in reason(module, num_bits=4)
    assert "scales per group" in reason(integers(8, INPUTS, strategy="group", groups=2, tokens=STATIC))
    assert "asymmetric weights" in reason(integers(8, INPUTS, asymmetric=True, tokens=ASYMMETRIC_STATIC))
