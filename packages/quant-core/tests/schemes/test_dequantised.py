"""Types whose weight is dequantised after loading: each formula in float64, by other means than the package's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bits import e2m1, unpack_eights
from float_modules import GROUPS, MXFP4, MXFP8, NVFP4_INPUT, TOKENS, fp8_module, nvfp4, stated, w4afp8
from mx_modules import mxfp4, mxfp8
from mx_reference import assert_near, nearest, stored_weight
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, AscendLinearScheme, LimitError, Partition, get_scheme_class
from quant_core.schemes.handover import hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.verify import linear_params, verify_stored

INPUTS, SIZES = 160, (24, 5, 19)


def linear(quant_type: str) -> type[AscendLinearScheme]:
    """The scheme of a type."""
    found = get_scheme_class(quant_type, "linear")
    assert found is not None
    assert issubclass(found, AscendLinearScheme)
    return found


def fp8_weight(stored: Stated) -> Tensor:
    """q · weight_scale; blocks by the number of each element's row and column."""
    weight, scale = stored["weight"].to(torch.float64), stored["weight_scale"].to(torch.float64)
    assert stored.weight is not None
    if stored.weight.block_structure is None:
        return weight * scale
    rows, columns = (torch.arange(n) // b for n, b in zip(weight.shape, stored.weight.block_structure, strict=True))
    return weight * scale[rows][:, columns]


def nvfp4_weight(stored: Stated) -> Tensor:
    """E2M1 · scale / global scale."""
    scale = stored["weight_scale"].to(torch.float64).repeat_interleave(16, 1)
    return e2m1(stored["weight"]).to(torch.float64) * scale / stored["weight_global_scale"].to(torch.float64)


def int4_weight(stored: Stated) -> Tensor:
    """(q - offset) · scale; packed ones are offset binary."""
    weight, scale = stored["weight"], stored["weight_scale"].to(torch.float64)
    offset = stored.get("weight_offset", torch.zeros(scale.shape, dtype=torch.int8))
    if weight.dtype == torch.int32:
        weight = unpack_eights(weight ^ -0x77777778)
        if "weight_offset" in stored:
            offset = unpack_eights(offset.t().contiguous() ^ -0x77777778).t()
    each = weight.shape[1] // scale.shape[1]
    values = weight.to(torch.float64) - offset.to(torch.float64).repeat_interleave(each, 1)
    return values * scale.repeat_interleave(each, 1)


def rounded(x: Tensor, form: ActivationForm | None, global_scale: float = 1.0) -> Tensor:
    """What an input's codes stand for, in float64, group by group; quotients are float32 ones, as the reference has."""
    if form is None:
        return x.to(torch.float64)
    parts = []
    for group in x.to(torch.float32).split(form.group_size or x.shape[1], dim=1):
        peak = group.abs().amax(1, keepdim=True)
        if form.outer:
            scale = nearest((global_scale * peak / 6).to(torch.float64), fp4=False, ties_away=False)
            quotients = group * global_scale / scale.to(torch.float32)
            codes = nearest(quotients.to(torch.float64), fp4=True, ties_away=False)
            part = torch.where(scale > 0, codes * scale / global_scale, 0)
        else:
            scale = peak / 448
            codes = nearest((group / scale).to(torch.float64), fp4=False, ties_away=False)
            part = torch.where(scale > 0, codes * scale.to(torch.float64), 0)
        parts.append(part)
    return torch.cat(parts, 1)


Made = Callable[[int, int], Stated]

#: A type, how its modules are made, its weight in float64.
TYPES: dict[str, tuple[str, Made, Callable[[Stated], Tensor]]] = {
    "WFP8A16": ("WFP8A16", fp8_module, fp8_weight),
    "WFP8A16 tensor": ("WFP8A16", lambda o, i: fp8_module(o, i, "tensor"), fp8_weight),
    "WFP8A16 scalar": ("WFP8A16", lambda o, i: fp8_module(o, i, "scalar"), fp8_weight),
    "WFP8A16 blocks": ("WFP8A16", lambda o, i: fp8_module(o, i, "block", block=(8, 48)), fp8_weight),
    "blocks": ("WFP8AFP8_BLOCK_DYNAMIC", lambda o, i: fp8_module(o, i, "block", GROUPS, block=(7, 128)), fp8_weight),
    "blocks per token": (
        "WFP8AFP8_BLOCK_DYNAMIC",
        lambda o, i: fp8_module(o, i, "block", TOKENS, block=(128, 128)),
        fp8_weight,
    ),
    "W8A16_MXFP8": ("W8A16_MXFP8", stated(mxfp8, MXFP8), stored_weight),
    "W4A16_MXFP4": ("W4A16_MXFP4", stated(mxfp4, MXFP4), stored_weight),
    "W4A16_NVFP4": ("W4A16_NVFP4", nvfp4, nvfp4_weight),
    "W4A4_NVFP4": ("W4A4_NVFP4", lambda o, i: nvfp4(o, i, NVFP4_INPUT), nvfp4_weight),
    "W4A4_NVFP4 scalar": ("W4A4_NVFP4", lambda o, i: nvfp4(o, i, NVFP4_INPUT, scalar=True), nvfp4_weight),
    "W4AFP8": ("W4AFP8_DYNAMIC", w4afp8, int4_weight),
    "W4AFP8 groups": ("W4AFP8_DYNAMIC", lambda o, i: w4afp8(o, i, 32), int4_weight),
    "W4AFP8 asymmetric": ("W4AFP8_DYNAMIC", lambda o, i: w4afp8(o, i, 32, asymmetric=True), int4_weight),
    "W4AFP8 packed": ("W4AFP8_DYNAMIC", lambda o, i: w4afp8(o, i, packed=True), int4_weight),
    "MXFP4 x FP8": ("W4A8_MXFP4_FP8_DYNAMIC", stated(mxfp4, MXFP4, GROUPS), stored_weight),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(workbench: Any, kind: str, dtype: torch.dtype) -> None:
    """Of members that each start a block of their own; with a zero row, a zero group, and a large row."""
    quant_type, make, weight_of = TYPES[kind]
    members = [make(out, INPUTS) for out in SIZES]
    scheme_class = linear(quant_type)
    scheme = scheme_class.create(workbench.context(members, dtype, scheme_class=scheme_class))
    assert scheme_class.can_serve(scheme.context) == []
    verify_stored(scheme)
    layer = workbench.load(scheme, members)
    exact = torch.cat([weight_of(member) for member in members])
    torch.testing.assert_close(scheme.dequantize(layer).to(torch.float64), exact, rtol=3e-7, atol=1e-12)
    scheme.process_weights_after_loading(layer)
    assert layer.get_parameter("weight").dtype == dtype
    assert {name for name, _ in layer.named_parameters()} <= {"weight", "input_global_scale"}
    x, bias = torch.randn(9, INPUTS).to(dtype), torch.randn(sum(SIZES)).to(dtype)
    x[3], x[4, :128], x[5] = 0, 0, x[5] * 100
    form = members[0].input
    global_scale = float(members[0].get("input_global_scale", torch.ones(1)))
    values = rounded(x, form, global_scale)
    # In bfloat16 weights, values in groups and sums are each rounded once more.
    weight = exact if dtype == torch.float32 else exact.to(dtype).to(torch.float64)
    slack = 1 if dtype == torch.float32 else 2
    if form == replace(GROUPS, group_size=form and form.group_size) and dtype == torch.bfloat16:
        values = values.to(dtype).to(torch.float64)
    assert_near(scheme.apply(layer, x, bias), values, weight, bias, slack)
    assert torch.equal(scheme.apply(layer, x[3:4], bias)[0], bias)


def test_members_with_input_scales_of_their_own(workbench: Any) -> None:
    scales = (0.02, 0.05, 0.05)
    members = [nvfp4(out, INPUTS, NVFP4_INPUT, input_scale=s) for out, s in zip(SIZES, scales, strict=True)]
    scheme, layer = workbench.serve(linear("W4A4_NVFP4"), members)
    assert layer.get_parameter("input_global_scale").tolist() == [1000, 400]
    x, bias = torch.randn(9, INPUTS), torch.randn(sum(SIZES))
    got = scheme.apply(layer, x, bias).split(SIZES, -1)
    for member, part, added in zip(members, got, bias.split(SIZES), strict=True):
        assert_near(part, rounded(x, NVFP4_INPUT, float(member["input_global_scale"])), nvfp4_weight(member), added)


def test_microscaled_weights_are_exact_in_bfloat16(workbench: Any) -> None:
    for quant_type, module in (("W8A16_MXFP8", mxfp8(9, 96)), ("W4A16_MXFP4", mxfp4(9, 96))):
        _, layer = workbench.serve(linear(quant_type), [module], dtype=torch.bfloat16)
        assert torch.equal(layer.get_parameter("weight").to(torch.float64), stored_weight(module))


def test_products_of_codes_do_not_overflow_in_float16(workbench: Any) -> None:
    """A token of large codes with a small scale: 448 of each of a thousand input features."""
    for quant_type, make in (("W4AFP8_DYNAMIC", w4afp8), ("W4A4_NVFP4", lambda o, i: nvfp4(o, i, NVFP4_INPUT))):
        module = make(8, 1024)
        module["weight"] = torch.full_like(module["weight"], 7 if quant_type.startswith("W4AFP8") else 0x77)
        scheme, layer = workbench.serve(linear(quant_type), [module], dtype=torch.float16)
        x = torch.full((1, 1024), 1e-2, dtype=torch.float16)
        exact = x.to(torch.float32) @ layer.get_parameter("weight").to(torch.float32).t()
        torch.testing.assert_close(scheme.apply(layer, x).to(torch.float32), exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_ranks_add_up(workbench: Any, kind: str) -> None:
    """Columns side by side in all types; rows where a token's scale is not each rank's own."""
    quant_type, make, _ = TYPES[kind]
    scheme_class = linear(quant_type)
    rows = 128 if "per token" in kind else 56
    members, x = [make(out, 512) for out in (2 * rows, rows * 4)], torch.randn(5, 512)
    scheme, layer = workbench.serve(scheme_class, members)
    whole = scheme.apply(layer, x)
    torch.testing.assert_close(workbench.run_ranks(scheme_class, members, x, "column", 2), whole)
    if members[0].input == TOKENS or kind == "WFP8A16 blocks":
        return
    torch.testing.assert_close(workbench.run_ranks(scheme_class, members, x, "row", 2), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["W4AFP8", "W4AFP8 groups", "blocks per token"])
def test_exact_tensor_parallel_quantises_as_one_rank(workbench: Any, kind: str) -> None:
    """The ranks' slices differ a hundredfold in size, so that scales of their own would give something else."""
    quant_type, make, _ = TYPES[kind]
    scheme_class, size = linear(quant_type), 4
    stored, x = make(24, 512), torch.randn(5, 512) * 10.0 ** torch.arange(4).repeat_interleave(128)
    x[2] = 0
    scheme, layer = workbench.serve(scheme_class, [stored])
    whole, parts = scheme.apply(layer, x), x.chunk(size, -1)
    peaks = torch.stack([part.abs().amax(-1) for part in parts]).amax(0)
    total = torch.zeros(5, 24)
    for rank, part in enumerate(parts):
        partition = Partition("row", rank, size, lambda own: peaks)
        scheme, layer = workbench.serve(scheme_class, [stored], partition=partition)
        total += scheme.apply(layer, part, tp_rank=rank)
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=float(whole.abs().max()) * 1e-5)


def test_cuts_through_blocks_and_groups_are_refused(workbench: Any) -> None:
    """By the layout where they go through what is stored, by the scheme where through groups of the input."""
    blocks, mixed = linear("WFP8AFP8_BLOCK_DYNAMIC"), linear("W4A8_MXFP4_FP8_DYNAMIC")
    module = fp8_module(256, 256, "block", GROUPS, block=(128, 128))
    for kind, size in (("column", 4), ("row", 4)):
        context = workbench.context([module], scheme_class=blocks, partition=Partition(kind, 0, size))
        with pytest.raises(LimitError, match="use tensor_parallel_size 2"):
            layouts_of(linear_params(blocks.create(context)), context)
    module = stated(mxfp4, MXFP4, GROUPS)(8, 384)
    context = workbench.context([module], scheme_class=mixed, partition=Partition("row", 0, 4))
    layouts_of(linear_params(mixed.create(context)), context)
    assert mixed.can_serve(context) == [
        "384 input features cannot be cut over 4 tensor-parallel ranks into whole groups of 128 that share a scale of "
        "the input (tensor_parallel_size 3, 1 would fit)"
    ]
    context = workbench.context([module], scheme_class=mixed, partition=Partition("row", 0, 3))
    assert mixed.can_serve(context) == []
    context = workbench.context([module], scheme_class=mixed, partition=Partition("column", 0, 4))
    assert mixed.can_serve(context) == []


def test_other_inputs_are_refused(workbench: Any) -> None:
    """What a type does not compute, no format can have it served as."""
    for quant_type, module in (
        ("WFP8A16", fp8_module(8, 64, "tensor", TOKENS)),
        ("WFP8AFP8_BLOCK_DYNAMIC", fp8_module(8, 64, "block", replace(GROUPS, dynamic=False))),
        ("W4A16_NVFP4", nvfp4(8, 64, NVFP4_INPUT)),
        ("W4AFP8_DYNAMIC", Stated(w4afp8(8, 64), w4afp8(8, 64).weight, replace(TOKENS, symmetric=False))),
        ("W4A8_MXFP4_FP8_DYNAMIC", stated(mxfp4, MXFP4, TOKENS)(8, 64)),
    ):
        scheme_class = linear(quant_type)
        (reason,) = scheme_class.can_serve(workbench.context([module], scheme_class=scheme_class))
        assert "has no such activations" in reason


def test_a_bias_and_what_others_hold_stay_on_the_layer(workbench: Any) -> None:
    scheme_class = linear("WFP8A16")
    module = fp8_module(8, 64)
    scheme = scheme_class.create(workbench.context([module], torch.bfloat16, scheme_class=scheme_class))
    layer = workbench.load(scheme, [module])
    hand_over(layer, [], [])
    layer.register_parameter("bias", torch.nn.Parameter(torch.randn(8)))
    scheme.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
