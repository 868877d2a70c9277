"""W4A4_MXFP4_FLATQUANT: microscaled FP4 after FlatQuant's transform."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import flatquant
from mx_modules import mxfp4_flatquant
from mx_reference import assert_near, microscaled, stored_weight
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.linear.w4a4_mxfp4_flatquant import AscendW4A4MXFP4FlatQuantLinearMethod as Scheme

Stored = dict[str, Tensor]


def permuting(out: int, inputs: int, right: bool = True) -> Stored:
    """A module whose matrices only move features and change signs, so that no rounding depends on sums."""
    stored = mxfp4_flatquant(out, inputs, flatquant(out, inputs, right=right))
    generator = torch.Generator().manual_seed(inputs)
    for name in ("left_trans", "right_trans"):
        if name in stored:
            size = stored[name].shape[0]
            signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1
            stored[name] = torch.eye(size)[torch.randperm(size, generator=generator)] * signs
    return stored


def transformed(x: Tensor, stored: Stored) -> Tensor:
    """leftᵀ · X · right in float64."""
    left = stored["left_trans"].to(torch.float64)
    matrix = left.t() @ x.to(torch.float64).unflatten(-1, (left.shape[0], -1))
    if "right_trans" in stored:
        matrix = matrix @ stored["right_trans"].to(torch.float64)
    return matrix.flatten(1)


def serve(workbench: Any, members: list[Stored], inputs: int, **options: Any) -> Any:
    """A scheme and its processed layer."""
    sizes = [member["weight"].shape[0] for member in members]
    return workbench.serve(Scheme, members, sizes=sizes, inputs=inputs, **options)


@pytest.mark.parametrize("inputs", [48, 80, 128, 384])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(workbench: Any, inputs: int, right: bool, bias: bool, dtype: torch.dtype) -> None:
    """Ties go to even here; members of a fused layer differ in their clip ratio, which has no effect."""
    members = [permuting(out, inputs, right) for out in (24, 5)]
    assert not torch.equal(members[0]["clip_ratio"], members[1]["clip_ratio"])
    scheme, layer = serve(workbench, members, inputs, dtype=dtype)
    x, added = (torch.randn(7, inputs) * 8).round().div(8).to(dtype), torch.randn(29).to(dtype) if bias else None
    weight = torch.cat([stored_weight(member) for member in members])
    seen = microscaled(transformed(x, members[0]), fp4=True, ties_away=False)
    assert not torch.equal(seen, microscaled(transformed(x, members[0]), fp4=True, ties_away=True))
    assert_near(scheme.apply(layer, x, added), seen, weight, added)


def test_a_matrix_that_mixes(workbench: Any) -> None:
    """Compared where float32 and float64 choose the same codes, which is nearly everywhere."""
    stored = mxfp4_flatquant(24, 128, flatquant(24, 128))
    scheme, layer = serve(workbench, [stored], 128)
    x = torch.randn(200, 128)
    exact = microscaled(transformed(x, stored), fp4=True, ties_away=False) @ stored_weight(stored).t()
    wrong = (scheme.apply(layer, x).to(torch.float64) - exact).abs().amax(1) > 1e-4 * exact.abs().amax(1)
    assert wrong.to(torch.float32).mean() < 0.05


@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
def test_any_number_of_tokens(workbench: Any, tokens: int) -> None:
    stored = permuting(5, 48)
    scheme, layer = serve(workbench, [stored], 48)
    x = torch.randn(tokens, 48)
    x[1::3] = 0
    got = scheme.apply(layer, x)
    assert_near(got, microscaled(transformed(x, stored), fp4=True, ties_away=False), stored_weight(stored))
    assert not got[1::3].any()


@pytest.mark.parametrize(("device", "weight"), [("950", ((64, 24), torch.uint8)), ("cpu", ((128, 24), torch.int8))])
def test_the_run_time_form(workbench: Any, device: str, weight: Any) -> None:
    stored = mxfp4_flatquant(24, 128, flatquant(24, 128))
    with planned_device(device):
        _, layer = serve(workbench, [stored], 128, dtype=torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": weight,
        "weight_scale": ((2, 24, 2), torch.uint8),
        "left_trans": ((8, 8), torch.bfloat16),
        "right_trans": ((16, 16), torch.bfloat16),
    }
    assert torch.equal(layer.left_trans, stored["left_trans"].t().to(torch.bfloat16))


def test_a_column_parallel_layer_is_cut_and_a_row_parallel_one_is_refused(workbench: Any) -> None:
    members = [permuting(out, 128) for out in (8, 4)]
    x, weight = torch.randn(3, 128), torch.cat([stored_weight(member) for member in members])
    seen = microscaled(transformed(x, members[0]), fp4=True, ties_away=False)
    assert_near(workbench.run_ranks(Scheme, members, x, "column", 2, sizes=[8, 4], inputs=128), seen, weight)
    context = workbench.context(members, sizes=[8, 4], inputs=128, partition=Partition("row", 0, 2))
    (reason,) = Scheme.can_serve(context)
    assert "use tensor_parallel_size 1" in reason


def test_sizes_that_the_operator_cannot_take_are_refused(workbench: Any) -> None:
    large = {**permuting(8, 600), "left_trans": torch.eye(2), "right_trans": torch.eye(300)}
    (reason,) = Scheme.can_serve(workbench.context([large], sizes=[8], inputs=600, scheme_class=Scheme))
    assert reason == "the operator takes sizes of up to 256, the second even, not (2, 300)"
    odd = {**permuting(8, 128), "left_trans": torch.eye(128), "right_trans": torch.eye(1)}
    (reason,) = Scheme.can_serve(workbench.context([odd], sizes=[8], inputs=128, scheme_class=Scheme))
    assert reason == "the operator takes sizes of up to 256, the second even, not (128, 1)"


def test_an_input_of_another_width_is_an_error(workbench: Any) -> None:
    scheme, layer = serve(workbench, [permuting(8, 128)], 128)
    with pytest.raises(LimitError, match="8 · 16 features, the input has 64"):
        scheme.apply(layer, torch.randn(3, 64))


@settings(max_examples=30)
@given(st.integers(0, 2**30), st.integers(1, 5), st.sampled_from([48, 80, 128]))
def test_quantising_loses_half_a_step(workbench: Any, seed: int, rows: int, inputs: int) -> None:
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    scheme = Scheme.create(
        workbench.context([permuting(rows, inputs)], sizes=[rows], inputs=inputs, scheme_class=Scheme)
    )
    found = scheme.dequantize(workbench.load(scheme, [scheme.quantize(weight)]))
    for block, error in zip(weight.split(32, 1), (found - weight).abs().split(32, 1), strict=True):
        assert bool((error <= block.abs().amax(1, keepdim=True) / 4).all())
