"""W4A4_MXFP4_DUALSCALE: float scales per group above the powers of two per block."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_modules import dual_scale
from mx_reference import assert_near, microscaled, stored_weight
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.linear.w4a4_mxfp4_dualscale import AscendW4A4MXFP4DualScaleLinearMethod as Scheme
from quant_core.schemes.verify import linear_params

# Input features and groups: of the operator's 512, fewer than that in one, and others.
SIZES = [(512, 1), (1024, 2), (80, 1), (384, 1), (128, 2), (192, 3), (768, 2)]


def rounded(x: Tensor, groups: int) -> Tensor:
    """Activations as the type sees them, in float64; the quotient is kept in x's dtype, as on the device."""
    parts = []
    for part in x.chunk(groups, -1):
        level0 = part.to(torch.float32).abs().amax(-1, keepdim=True) / 6
        quotient = torch.where(level0 > 0, part.to(torch.float32) / level0, 0).to(x.dtype)
        parts.append(microscaled(quotient, fp4=True, ties_away=True) * level0.to(torch.float64))
    return torch.cat(parts, -1)


def weight_of(stored: dict[str, Tensor]) -> Tensor:
    """Elements times both scales in float64."""
    weight, dual = stored_weight(stored), stored["weight_dual_scale"].to(torch.float64).squeeze(-1)
    return weight * dual.repeat_interleave(weight.shape[1] // dual.shape[1], dim=1)


def context_of(workbench: Any, stored: dict[str, Tensor], inputs: int, **options: Any) -> Any:
    """A layer of one module."""
    return workbench.context([stored], sizes=[stored["weight"].shape[0]], inputs=inputs, scheme_class=Scheme, **options)


@pytest.mark.parametrize(("inputs", "groups"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(workbench: Any, inputs: int, groups: int, bias: bool, dtype: torch.dtype) -> None:
    members = [dual_scale(out, inputs, groups) for out in (24, 5)]
    scheme, layer = workbench.serve(Scheme, members, sizes=[24, 5], inputs=inputs, dtype=dtype)
    x, added = torch.randn(7, inputs).to(dtype), torch.randn(29).to(dtype) if bias else None
    x[:, : inputs // 2] *= 100  # so that one scale for all groups would lose the second half
    weight = torch.cat([weight_of(member) for member in members])
    assert_near(scheme.apply(layer, x, added), rounded(x, groups), weight, added)


@pytest.mark.parametrize(("inputs", "groups"), [(80, 1), (128, 2)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
def test_any_number_of_tokens_of_any_size(workbench: Any, tokens: int, inputs: int, groups: int) -> None:
    stored = dual_scale(5, inputs, groups)
    scheme, layer = workbench.serve(Scheme, [stored], sizes=[5], inputs=inputs)
    x = torch.randn(tokens, inputs) * 10.0 ** torch.randint(-15, 15, (tokens, 1))
    x[1::3] = 0
    got = scheme.apply(layer, x)
    assert_near(got, rounded(x, groups), weight_of(stored))
    assert not got[1::3].any()


@pytest.mark.parametrize(("device", "packed"), [("950", 2), ("cpu", 1)])
@pytest.mark.parametrize(("inputs", "groups", "outer"), [(1024, 2, (24,)), (128, 2, (2, 24))])
def test_the_run_time_form(
    workbench: Any, inputs: int, groups: int, outer: tuple[int, ...], device: str, packed: int
) -> None:
    """What the operators take, or one operand for each group; on CPU with one value to a byte."""
    with planned_device(device):
        _, layer = workbench.serve(Scheme, [dual_scale(24, inputs, groups)], sizes=[24], inputs=inputs)
    columns = inputs // len(outer)
    assert tuple(layer.weight.shape) == (*outer, columns // packed)
    assert layer.weight.dtype == (torch.uint8 if device == "950" and len(outer) == 2 else torch.int8)
    assert tuple(layer.weight_scale.shape) == (*outer, columns // 64, 2)
    assert tuple(layer.weight_dual_scale.shape) == (groups, 24)
    assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) == 24 * (
        inputs // packed + inputs // 32 + 4 * groups
    )


@pytest.mark.parametrize(("inputs", "groups"), SIZES)
def test_both_run_time_forms_give_the_same(workbench: Any, inputs: int, groups: int) -> None:
    stored, x, outputs = dual_scale(24, inputs, groups), torch.randn(5, inputs), []
    for device in ("950", "cpu"):
        with planned_device(device):
            scheme, layer = workbench.serve(Scheme, [stored], sizes=[24], inputs=inputs)
        outputs.append(scheme.apply(layer, x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("inputs", "groups"), [(512, 1), (2048, 4)])
def test_the_usual_form_is_declared_while_there_are_no_files(workbench: Any, inputs: int, groups: int) -> None:
    """Groups of 512, the operators' and the tool's."""
    stored = dual_scale(24, inputs, groups)
    context = context_of(workbench, stored, inputs)
    scheme = Scheme.create(type(context)(**{**vars(context), "stored": ()}))
    assert {name: (p.shape, p.dtype) for name, (p,) in linear_params(scheme).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }


@pytest.mark.parametrize(
    ("inputs", "groups", "reason"),
    [
        (
            128,
            3,
            "128 input features cannot be cut into 3 equal groups: {} is [8, 3, 1], expected [8, a divisor of 128, 1]",
        ),
        (192, 2, "groups of 96 input features are no multiple of 64: {} is [8, 2, 1], for 192 input features"),
    ],
)
def test_groups_that_no_operand_can_have_are_refused(workbench: Any, inputs: int, groups: int, reason: str) -> None:
    """By the tensor that tells how many there are."""
    told = reason.format("m0.weight_dual_scale in model.safetensors")
    assert Scheme.can_serve(context_of(workbench, dual_scale(8, inputs, groups), inputs)) == [told]


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([64, 512]), st.integers(0, 2**30))
def test_tensor_parallel_outputs_are_those_of_one_rank(
    workbench: Any, size: int, groups: int, length: int, seed: int
) -> None:
    """Ranks hold whole groups, so their activations have the scales of one rank."""
    torch.manual_seed(seed)
    inputs, sizes = size * groups * length, [4 * size, 2 * size]
    members = [dual_scale(out, inputs, size * groups) for out in sizes]
    x = torch.randn(3, inputs)
    weight = torch.cat([weight_of(member) for member in members])
    for cut in ("column", "row"):
        got = workbench.run_ranks(Scheme, members, x, cut, size, sizes=sizes, inputs=inputs)
        assert_near(got, rounded(x, size * groups), weight)


def test_a_cut_through_a_group_names_a_size_that_works(workbench: Any) -> None:
    context = context_of(workbench, dual_scale(8, 384, 3), 384, partition=Partition("row", 0, 4))
    with pytest.raises(LimitError, match="use tensor_parallel_size 3"):
        layouts_of(linear_params(Scheme.create(context)), context)


@settings(max_examples=40)
@given(st.integers(0, 2**30), st.integers(1, 4), st.sampled_from(SIZES))
def test_quantising_loses_half_a_step(workbench: Any, seed: int, rows: int, sizes: tuple[int, int]) -> None:
    """Of the block's largest step; and what it returns is what is declared."""
    inputs, groups = sizes
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    weight *= 10.0 ** torch.arange(groups).repeat_interleave(inputs // groups)
    weight[0, : inputs // groups] = 0
    scheme = Scheme.create(context_of(workbench, dual_scale(rows, inputs, groups), inputs))
    stored = scheme.quantize(weight)
    found = scheme.dequantize(workbench.load(scheme, [stored]))
    assert not found[0, : inputs // groups].any()
    for block, error in zip(weight.split(32, 1), (found - weight).abs().split(32, 1), strict=True):
        assert bool((error <= block.abs().amax(1, keepdim=True) / 4).all())
    torch.testing.assert_close(found.to(torch.float64), weight_of(stored))
