"""Dynamic types with zero points, of weights and of tokens, and with one scale for a tensor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from integer_modules import ASYMMETRIC_TOKENS, STATIC, TOKENS, exact_weight, integers
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, AscendLinearScheme, Partition
from quant_core.devices import planned_device
from quant_core.schemes.linear.w4a4_dynamic import AscendW4A4DynamicLinearMethod
from quant_core.schemes.linear.w4a8_dynamic import AscendW4A8DynamicLinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.verify import verify_stored

INPUTS, F32 = 64, torch.float32
NIBBLES = ActivationForm(num_bits=4)

#: The scheme, the bits of its weights, and the forms of its input.
TYPES: dict[str, tuple[type[AscendLinearScheme], int, ActivationForm]] = {
    "W8A8": (AscendW8A8DynamicLinearMethod, 8, TOKENS),
    "W8A8 asymmetric": (AscendW8A8DynamicLinearMethod, 8, ASYMMETRIC_TOKENS),
    "W4A8": (AscendW4A8DynamicLinearMethod, 4, TOKENS),
    "W4A8 asymmetric": (AscendW4A8DynamicLinearMethod, 4, ASYMMETRIC_TOKENS),
    "W4A4": (AscendW4A4DynamicLinearMethod, 4, NIBBLES),
}


def quantised(x: Tensor, tokens: ActivationForm) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales of each token in float64, by the operators' definitions."""
    values = x.to(torch.float64)
    if tokens.symmetric:
        scale = values.abs().amax(-1, keepdim=True) / (2 ** (tokens.num_bits - 1) - 1)
        return torch.round(values / scale), torch.zeros_like(scale), scale
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
    scale = (high - low) / 255
    offset = 127 - high / scale
    return torch.round(values / scale + offset).clamp(-128, 127), offset, scale


def check(got: Tensor, x: Tensor, module: Stated, bias: Tensor | None = None) -> None:
    """y = x_scale · Σ (q_x - z_x) (q_w - z_w) s_w + bias, up to float32 sums and one rounding to the output's dtype."""
    codes, x_offset, x_scale = quantised(x, module.input)
    weight, offset, scale = exact_weight(module)
    exact = x_scale * ((codes - x_offset) @ ((weight - offset) * scale).t())
    exact = exact if bias is None else exact + bias.to(torch.float64)
    size = x_scale * ((codes.abs() + x_offset.abs()) @ ((weight.abs() + offset.abs()) * scale).t())
    tolerance = torch.finfo(got.dtype).eps / 2 * exact.abs() + 2**-21 * size + 2**-24
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


def inputs(count: int, tokens: ActivationForm, width: int = INPUTS, dtype: torch.dtype = F32) -> Tensor:
    """Small multiples of a scale that is a power of two, so that no code depends on rounding."""
    most = 2 ** (tokens.num_bits - 1) - 1
    codes = torch.randint(-most + 1, most, (count, width))
    codes[:, 0], codes[:, 1] = most, -most if tokens.symmetric else -most - 1
    offset = 0 if tokens.symmetric else torch.randint(-60, 60, (count, 1))
    scale = 2.0 ** torch.randint(-6, -2, (count, 1))
    return ((codes - offset) * scale).to(dtype)


def module(kind: str, out: int, width: int = INPUTS, **options: Any) -> Stated:
    _, num_bits, tokens = TYPES[kind]
    return integers(out, width, num_bits, tokens=tokens, **options)


@pytest.mark.usefixtures("each_gemm")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("strategy", "groups"), [("tensor", 1), ("channel", 1), ("group", 4)])
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("device", ["cpu", "910B"])
def test_the_formula(workbench: Any, kind: str, strategy: str, groups: int, asymmetric: bool, device: str) -> None:
    """Stored packed and not, with scales in 16 bits, of fused members that differ."""
    tokens = TYPES[kind][2]
    for dtype, packed in ((F32, strategy != "tensor" or not asymmetric), (F32, False), (torch.float16, False)):
        stored = torch.bfloat16 if dtype == F32 else dtype
        options = {"strategy": strategy, "groups": groups, "asymmetric": asymmetric, "model": stored}
        members = [module(kind, out, packed=packed, **options) for out in (24, 8)]
        with planned_device(device):
            scheme, layer = workbench.serve(TYPES[kind][0], members, dtype=dtype)
            verify_stored(scheme)
            # float16 holds the values of these inputs, whose codes have eleven bits at most.
            x, bias = inputs(9, tokens, dtype=dtype), torch.randn(32).to(dtype)
            got, added = scheme.apply(layer, x).split([24, 8], -1), scheme.apply(layer, x, bias).split([24, 8], -1)
        for index, member in enumerate(members):
            check(got[index], x, member)
            check(added[index], x, member, bias.split([24, 8])[index])


@pytest.mark.parametrize("kind", ["W8A8", "W8A8 asymmetric"])
def test_nothing_is_rounded_to_bfloat16_before_it_is_complete(workbench: Any, kind: str) -> None:
    """Zero points at the end of their range make sums many times as large as what they leave."""
    stored = module(kind, 24, asymmetric=True)
    stored["weight"] = torch.randint(100, 128, (24, INPUTS), dtype=torch.int8)
    stored["weight_offset"] = torch.full((24, 1), 127, dtype=torch.int8)
    scheme, layer = workbench.serve(TYPES[kind][0], [stored], dtype=torch.bfloat16)
    codes = torch.randint(90, 128, (9, INPUTS))
    codes[:, 0], codes[:, 1] = 127, -128
    x = (codes / 64).to(torch.bfloat16) if TYPES[kind][2].symmetric else ((codes - 64) / 64).to(torch.bfloat16)
    check(scheme.apply(layer, x), x, stored)


def test_zero_points_that_are_no_integers(workbench: Any) -> None:
    stored = module("W8A8", 24, strategy="group", groups=2, asymmetric=True)
    stored.weight = replace(stored.weight, offset_type="float")
    stored["weight_offset"] = torch.randn(24, 2)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    assert layer.weight_offset.dtype == F32
    x = inputs(5, TOKENS)
    check(scheme.apply(layer, x), x, stored)


def test_symmetric_layers_keep_their_two_operators(workbench: Any) -> None:
    """And what they hold."""
    for strategy in ("channel", "tensor"):
        scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [module("W8A8", 24, strategy=strategy)])
        assert not scheme.corrects
        held = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
        assert held == {"weight": ((INPUTS, 24), torch.int8), "weight_scale": ((24,), F32)}


def test_the_run_time_form(workbench: Any) -> None:
    stored = module("W8A8 asymmetric", 24, strategy="group", groups=4, asymmetric=True, packed=True)
    _, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((INPUTS, 24), torch.int8),
        "weight_scale": ((4, 24), F32),
        "weight_offset": ((4, 24), torch.int32),
        "weight_sum": ((24,), F32),
    }


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_outputs(workbench: Any, kind: str, size: int) -> None:
    """One rank's side by side; a row-parallel rank corrects for its own columns, of which it has the scale."""
    scheme_class, _, tokens = TYPES[kind]
    members = [module(kind, out, strategy="group", groups=4, asymmetric=True, packed=True) for out in (64, 32)]
    x = torch.cat([inputs(5, tokens, INPUTS // size) for _ in range(size)], dim=-1)
    scheme, layer = workbench.serve(scheme_class, members)
    assert torch.equal(workbench.run_ranks(scheme_class, members, x, "column", size), scheme.apply(layer, x))
    summed = workbench.run_ranks(scheme_class, members, x, "row", size)
    weight = torch.cat([(w - z) * s for w, z, s in map(exact_weight, members)])
    # These slices have exact codes of their own, so the sum is the float layer's output.
    torch.testing.assert_close(summed.to(torch.float64), x.to(torch.float64) @ weight.t(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_exact_tensor_parallel_quantises_as_one_rank(
    workbench: Any, dtype: torch.dtype, count: int, compile_afresh: Any
) -> None:
    """The ranks' slices differ a thousandfold in size; both extremes go over the ranks in one reduction."""
    stored, size = module("W8A8 asymmetric", 24, asymmetric=True), 4
    x = (torch.randn(count, INPUTS) * 10.0 ** torch.arange(size).repeat_interleave(INPUTS // size)).to(dtype)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype)
    whole, parts = scheme.apply(layer, x).to(F32), x.chunk(size, -1)
    extremes = torch.stack([torch.stack([p.amax(-1), -p.amin(-1)]).to(F32) for p in parts])
    outputs = []
    for rank, part in enumerate(parts):
        asked: list[Tensor] = []
        partition = Partition("row", rank, size, lambda own, asked=asked: (asked.append(own), extremes.amax(0))[1])
        scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype, partition=partition)
        outputs.append(scheme.apply(layer, part, tp_rank=rank).to(F32))
        assert len(asked) == 1
        assert torch.equal(asked[0], extremes[rank])
    if count:
        error = (sum(outputs) - whole).abs().max() / whole.abs().max()
        assert error < torch.finfo(dtype).eps * size + 1e-4
    last = Partition("row", size - 1, size, lambda own: own * 2)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype, partition=last)
    compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager")
    assert torch.equal(compiled(parts[-1]), scheme.apply(layer, parts[-1]))


def test_tokens_of_zeros_and_of_one_value(workbench: Any) -> None:
    stored = module("W8A8 asymmetric", 24, asymmetric=True)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    weight, offset, scale = exact_weight(stored)
    x = torch.tensor([[0.0], [3.0]]).expand(2, INPUTS)
    got = scheme.apply(layer, x).to(torch.float64)
    assert got[0].abs().max() < 1e-9
    exact = 3 * ((weight - offset) * scale).sum(1)
    torch.testing.assert_close(got[1], exact, rtol=1e-5, atol=1e-4)


def test_what_a_type_does_not_take_is_said(workbench: Any) -> None:
    def reasons(kind: str, tokens: ActivationForm) -> str:
        scheme_class, num_bits, _ = TYPES[kind]
        context = workbench.context([integers(8, INPUTS, num_bits, tokens=tokens)])
        return "; ".join(scheme_class.can_serve(context))

    assert "such activations" in reasons("W4A4", replace(NIBBLES, symmetric=False))
    assert "such activations" in reasons("W4A4", TOKENS)
    assert "such activations" in reasons("W8A8", STATIC)
    assert reasons("W4A8", ASYMMETRIC_TOKENS) == ""


@pytest.mark.parametrize(("outputs", "size"), [((60, 8), 1), ((48, 16), 4)])
def test_packed_zero_points_are_not_cut(workbench: Any, outputs: tuple[int, int], size: int) -> None:
    """A member must have whole int32 of them, and so must each rank's part of it."""
    fitting = [module("W4A8", 64, asymmetric=True, packed=True) for _ in outputs]
    partition = Partition("column" if size > 1 else "replicated", 0, size)
    context = workbench.context(fitting, sizes=outputs, partition=partition)
    reasons = AscendW4A8DynamicLinearMethod.can_serve(context)
    if size == 1:
        assert reasons == [
            "60 output features do not fill elements of 8 values, as weight_offset is packed: 56 or 64 would fit, or "
            "any multiple of 8"
        ]
        return
    assert reasons == []
    with pytest.raises(Exception, match="weight_offset cannot be cut over 4 tensor-parallel ranks"):
        workbench.load(AscendW4A8DynamicLinearMethod.create(context), fitting)
