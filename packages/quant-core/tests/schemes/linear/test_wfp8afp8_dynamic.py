"""WFP8AFP8_DYNAMIC: FP8 with scales per token, found at run time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_modules import wfp8afp8
from mx_reference import assert_near, nearest
from torch import Tensor

from quant_core import Partition, get_scheme_class
from quant_core.devices import planned_device
from quant_core.schemes.linear.wfp8afp8_dynamic import AscendW8A8FP8DynamicLinearMethod
from quant_core.schemes.verify import linear_params

INPUTS = 72


def rounded(x: Tensor) -> Tensor:
    """What a token's codes and scale stand for, in float64."""
    values = x.to(torch.float64)
    scale = values.abs().amax(-1, keepdim=True) / 448
    return torch.where(scale > 0, nearest(values / scale, fp4=False, ties_away=False) * scale, 0)


def weight_of(stored: dict[str, Tensor]) -> Tensor:
    """q · weight_scale in float64."""
    return stored["weight"].to(torch.float64) * stored["weight_scale"].to(torch.float64)


def exact_codes_input(tokens: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Values that E4M3 has, times a power of two for each row: no code depends on rounding."""
    codes = (torch.randn(tokens, inputs) * 40).to(torch.float8_e4m3fn).to(torch.float32)
    codes[:, 0] = 448
    return (codes * 2.0 ** torch.randint(-6, 3, (tokens, 1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula(workbench: Any, dtype: torch.dtype, stored_dtype: torch.dtype, bias: bool) -> None:
    members = [wfp8afp8(out, INPUTS, stored_dtype) for out in (24, 5)]
    scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, members, dtype=dtype)
    x, added = exact_codes_input(9, INPUTS, dtype), torch.randn(29).to(dtype) if bias else None
    weight = torch.cat([weight_of(member) for member in members])
    assert_near(scheme.apply(layer, x, added), x.to(torch.float64), weight, added)


def test_activations_are_rounded_to_the_nearest_code(workbench: Any) -> None:
    """Compared where float32 and float64 choose the same codes, which is nearly everywhere."""
    stored = wfp8afp8(24, INPUTS)
    scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored])
    x = torch.randn(200, INPUTS)
    got, exact = scheme.apply(layer, x).to(torch.float64), rounded(x) @ weight_of(stored).t()
    wrong = (got - exact).abs().amax(1) > 1e-4 * exact.abs().amax(1)
    assert wrong.to(torch.float32).mean() < 0.05
    assert (x.to(torch.float64) - rounded(x)).norm() / x.norm() > 0.01, "the rounding is far from nothing"


@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
def test_zero_rows_and_rows_of_any_size(workbench: Any, tokens: int) -> None:
    stored = wfp8afp8(5, INPUTS)
    scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored])
    x = exact_codes_input(tokens, INPUTS, torch.float32) * 2.0 ** torch.randint(-60, 60, (tokens, 1))
    x[1::3] = 0
    got = scheme.apply(layer, x)
    assert_near(got, x.to(torch.float64), weight_of(stored))
    assert not got[1::3].any()


@pytest.mark.parametrize(("device", "dtype"), [("950", torch.float8_e4m3fn), ("cpu", torch.bfloat16)])
def test_the_run_time_form(workbench: Any, device: str, dtype: torch.dtype) -> None:
    """On CPU the weight is decoded, which changes no output."""
    stored, x = wfp8afp8(24, INPUTS, torch.bfloat16), torch.randn(3, INPUTS).to(torch.bfloat16)
    plain, coded = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored, stored], dtype=torch.bfloat16)
    with planned_device(device):
        scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored, stored], dtype=torch.bfloat16)
    assert torch.equal(scheme.apply(layer, x), plain.apply(coded, x))
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((INPUTS, 48), dtype),
        "weight_scale": ((48,), torch.float32),
    }
    assert layer.weight.untyped_storage().nbytes() == INPUTS * 48 * dtype.itemsize


def test_the_usual_form_is_declared_while_there_are_no_files(workbench: Any) -> None:
    stored = wfp8afp8(24, INPUTS)
    context = workbench.context([stored])
    scheme = AscendW8A8FP8DynamicLinearMethod.create(type(context)(**{**vars(context), "stored": ()}))
    assert {name: (p.shape, p.dtype) for name, (p,) in linear_params(scheme).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }


def test_both_names_and_the_products_that_serve_them(workbench: Any) -> None:
    assert get_scheme_class("WFP8AFP8_DYNAMIC", "linear") is AscendW8A8FP8DynamicLinearMethod
    assert get_scheme_class("W8A8FP8_DYNAMIC", "linear") is AscendW8A8FP8DynamicLinearMethod
    context = workbench.context([wfp8afp8(8, INPUTS)])
    with planned_device("910C"):
        (reason,) = AscendW8A8FP8DynamicLinearMethod.can_serve(context)
    assert reason == "needs one of the devices 950, cpu, this one is 910C"


def test_an_asymmetric_weight_or_one_that_is_nan_is_refused_by_its_values(workbench: Any) -> None:
    declared = AscendW8A8FP8DynamicLinearMethod.create(
        workbench.context([wfp8afp8(8, INPUTS)], scheme_class=AscendW8A8FP8DynamicLinearMethod)
    ).params(INPUTS, 8)
    offset, weight = declared["weight_offset"].check, declared["weight"].check
    assert offset is not None
    assert weight is not None
    assert offset(torch.tensor([[0.0], [3.0]])) == "1 of 2 values are not zero: the type is symmetric, for example 3.0"
    assert weight(torch.tensor([[448.0, torch.nan]]).to(torch.float8_e4m3fn)) == "1 of 2 values are NaN"


@given(st.integers(0, 2**30), st.integers(1, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantising_loses_half_a_step(workbench: Any, seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """A sixteenth of a value, or half of the smallest step; and what it returns is what is declared."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = 0
    scheme = AscendW8A8FP8DynamicLinearMethod.create(
        workbench.context([wfp8afp8(rows, columns)], scheme_class=AscendW8A8FP8DynamicLinearMethod)
    )
    stored = scheme.quantize(weight)
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    error = (scheme.dequantize(layer) - weight.to(torch.float32)).abs()
    step = torch.maximum(weight.to(torch.float32).abs() / 16, stored["weight_scale"] * 2**-10)
    assert bool((error <= step * (1 + 1e-5)).all())
    assert not scheme.dequantize(layer)[0].any()


def test_a_quantised_layer_serves_the_float_one(workbench: Any) -> None:
    weight, x, bias = torch.randn(24, INPUTS), torch.randn(50, INPUTS), torch.randn(24)
    plan = AscendW8A8FP8DynamicLinearMethod.create(
        workbench.context([wfp8afp8(24, INPUTS)], scheme_class=AscendW8A8FP8DynamicLinearMethod)
    )
    scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [plan.quantize(weight)])
    exact = x @ weight.t() + bias
    assert (scheme.apply(layer, x, bias) - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_exact_tensor_parallel_quantises_as_one_rank(
    workbench: Any, tokens: int, dtype: torch.dtype, compile_afresh: Any
) -> None:
    """The ranks' slices differ a thousandfold in size, so that scales of their own would give something else."""
    stored, size = wfp8afp8(24, INPUTS), 4
    x = (torch.randn(tokens, INPUTS) * 10.0 ** torch.arange(size).repeat_interleave(INPUTS // size)).to(dtype)
    x[2:3] = 0
    scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored], dtype=dtype)
    whole = scheme.apply(layer, x)
    parts = x.chunk(size, -1)
    peaks = torch.stack([part.abs().amax(-1).to(torch.float32) for part in parts])
    outputs = []
    for rank, part in enumerate(parts):
        partition = Partition("row", rank, size, lambda own: peaks.amax(0))
        scheme, layer = workbench.serve(AscendW8A8FP8DynamicLinearMethod, [stored], dtype=dtype, partition=partition)
        outputs.append(scheme.apply(layer, part, tp_rank=rank).to(torch.float32))
    tolerance = torch.finfo(dtype).eps * size
    torch.testing.assert_close(
        sum(outputs), whole.to(torch.float32), rtol=tolerance, atol=whole.abs().sum().item() / 1e5
    )
    assert not sum(outputs)[2:3].any()
    compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager")
    assert torch.equal(compiled(parts[-1]), scheme.apply(layer, parts[-1]))


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 9))


@settings(max_examples=50)
@given(SHAPES, st.integers(0, 2**30))
def test_tensor_parallel_outputs(workbench: Any, shape: tuple[int, list[int], int], seed: int) -> None:
    """One rank's side by side; a row-parallel rank quantises its slice with a scale of its own."""
    torch.manual_seed(seed)
    size, outputs, width = shape
    members = [wfp8afp8(out * size, width * size) for out in outputs]
    x = torch.cat([exact_codes_input(3, width, torch.float32) for _ in range(size)], dim=-1)
    weight = torch.cat([weight_of(member) for member in members])
    columns = workbench.run_ranks(AscendW8A8FP8DynamicLinearMethod, members, x, "column", size)
    assert_near(columns, rounded(x), weight)
    # These slices have exact codes of their own, so their sum is the float layer's output.
    summed = workbench.run_ranks(AscendW8A8FP8DynamicLinearMethod, members, x, "row", size)
    assert_near(summed, x.to(torch.float64), weight)
