"""W8A8_DYNAMIC: scales per token, found at run time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.verify import linear_params

INPUTS = 64


def exact_output(x: Tensor, stored: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """(a qᵀ) · x_scale · weight_scale + bias in float64."""
    values = x.to(torch.float64)
    scale = values.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, torch.round(values / scale), 0)
    y = codes @ stored["weight"].to(torch.float64).t() * scale * stored["weight_scale"].to(torch.float64).flatten()
    return y if bias is None else y + bias.to(torch.float64)


def exact_codes_input(tokens: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Inputs that are small multiples of each row's scale, which is a power of two: no code depends on rounding."""
    codes = torch.randint(-126, 127, (tokens, inputs))
    codes[:, 0] = 127
    return (codes * 2.0 ** torch.randint(-6, 3, (tokens, 1))).to(dtype)


@pytest.mark.usefixtures("each_gemm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula(make: Any, workbench: Any, dtype: torch.dtype, stored_dtype: torch.dtype, bias: bool) -> None:
    stored = make["W8A8_DYNAMIC"](24, INPUTS, model=stored_dtype)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype)
    x = exact_codes_input(9, INPUTS, dtype)
    added = torch.randn(24).to(dtype) if bias else None
    got, exact = scheme.apply(layer, x, added), exact_output(x, stored, added)
    torch.testing.assert_close(got.to(torch.float64), exact, rtol=torch.finfo(dtype).eps / 2 + 2**-20, atol=1e-4)


def test_zero_rows_and_rows_of_any_size(make: Any, workbench: Any) -> None:
    stored = make["W8A8_DYNAMIC"](24, INPUTS)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    x = exact_codes_input(4, INPUTS, torch.float32) * torch.tensor([[1e-20], [0], [1], [1e20]])
    got = scheme.apply(layer, x)
    assert not got[1].any()
    torch.testing.assert_close(got.to(torch.float64), exact_output(x, stored), rtol=1e-5, atol=0)


def test_the_run_time_form(make: Any, workbench: Any) -> None:
    stored = make["W8A8_DYNAMIC"](24, INPUTS, model=torch.bfloat16)
    _, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored, stored], dtype=torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((INPUTS, 48), torch.int8),
        "weight_scale": ((48,), torch.float32),
    }


def test_the_usual_form_is_declared_while_there_are_no_files(workbench: Any, make: Any) -> None:
    stored = make["W8A8_DYNAMIC"](24, INPUTS)
    context = workbench.context([stored], dtype=torch.bfloat16)
    scheme = AscendW8A8DynamicLinearMethod.create(type(context)(**{**vars(context), "stored": ()}))
    assert {name: (p.shape, p.dtype) for name, (p,) in linear_params(scheme).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
def test_scales_per_group(make: Any, workbench: Any, groups: int, tokens: int) -> None:
    """Each group's sums have their own scale; the sum of all has the token's."""
    stored, bias = make["W8A8_DYNAMIC"](12, INPUTS, groups=groups), torch.randn(12)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    x = exact_codes_input(tokens, INPUTS, torch.float32)
    weight = stored["weight"].double() * stored["weight_scale"].double().repeat_interleave(INPUTS // groups, 1)
    exact = exact_output(x, {"weight": weight, "weight_scale": torch.ones(12, 1)}, bias)
    torch.testing.assert_close(scheme.apply(layer, x, bias).double(), exact, rtol=2**-20, atol=1e-3)


def test_groups_are_cut_between_ranks(make: Any, workbench: Any) -> None:
    stored, peak = make["W8A8_DYNAMIC"](12, INPUTS, groups=4), 1.0
    x = torch.rand(5, INPUTS)
    x[:, 0] = x[:, INPUTS // 2] = peak  # so that both halves have the scale of the whole
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored])
    both = workbench.run_ranks(AscendW8A8DynamicLinearMethod, [stored], x, "row", 2)
    torch.testing.assert_close(both, scheme.apply(layer, x))
    with pytest.raises(LimitError, match="use tensor_parallel_size 4"):
        workbench.serve(AscendW8A8DynamicLinearMethod, [stored], partition=Partition("row", 0, 8))


def test_unequal_groups_are_refused(workbench: Any) -> None:
    stored = {"weight": torch.zeros(8, INPUTS, dtype=torch.int8), "weight_scale": torch.ones(8, 3)}
    (reason,) = AscendW8A8DynamicLinearMethod.can_serve(
        workbench.context([stored], scheme_class=AscendW8A8DynamicLinearMethod)
    )
    assert reason == (
        "64 input features cannot be cut into 3 equal groups: m0.weight_scale in model.safetensors is [8, 3], "
        "expected [8, a divisor of 64]; groups of 16 or 32 input features would fit"
    )


def test_an_asymmetric_weight_is_refused_by_its_values(workbench: Any, make: Any) -> None:
    scheme = AscendW8A8DynamicLinearMethod.create(
        workbench.context([make["W8A8_DYNAMIC"](8, INPUTS)], scheme_class=AscendW8A8DynamicLinearMethod)
    )
    check = scheme.params(INPUTS, 8)["weight_offset"].check
    assert check is not None
    assert check(torch.zeros(8, 1)) is None
    assert check(torch.tensor([0.0, 3.0])) == "1 of 2 values are not zero: the type is symmetric, for example 3.0"


@given(st.integers(0, 2**30), st.integers(1, 9), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantising_loses_half_a_step(
    workbench: Any, make: Any, seed: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    """And what it returns is what is declared."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = 0
    scheme = AscendW8A8DynamicLinearMethod.create(
        workbench.context([make["W8A8_DYNAMIC"](rows, columns)], scheme_class=AscendW8A8DynamicLinearMethod)
    )
    stored = scheme.quantize(weight)
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    error = (scheme.dequantize(layer) - weight.to(torch.float32)).abs()
    assert bool((error <= stored["weight_scale"] * (0.5 + 1e-5)).all())
    assert not scheme.dequantize(layer)[0].any()


def test_a_quantised_layer_serves_the_float_one(workbench: Any, make: Any) -> None:
    weight, x, bias = torch.randn(24, INPUTS), torch.randn(5, INPUTS), torch.randn(24)
    plan = AscendW8A8DynamicLinearMethod.create(
        workbench.context([make["W8A8_DYNAMIC"](24, INPUTS)], scheme_class=AscendW8A8DynamicLinearMethod)
    )
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [plan.quantize(weight)])
    exact = x @ weight.t() + bias
    assert (scheme.apply(layer, x, bias) - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_exact_tensor_parallel_quantises_as_one_rank(
    make: Any, workbench: Any, tokens: int, dtype: torch.dtype, compile_afresh: Any
) -> None:
    """The ranks' slices differ a thousandfold in size, so that scales of their own would give something else."""
    stored, size = make["W8A8_DYNAMIC"](24, INPUTS), 4
    x = (torch.randn(tokens, INPUTS) * 10.0 ** torch.arange(size).repeat_interleave(INPUTS // size)).to(dtype)
    x[2:3] = 0
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype)
    whole = scheme.apply(layer, x)
    parts = x.chunk(size, -1)
    peaks = torch.stack([part.abs().amax(-1).to(torch.float32) for part in parts])
    outputs = []
    for rank, part in enumerate(parts):
        asked: list[Tensor] = []
        partition = Partition("row", rank, size, lambda own, asked=asked: (asked.append(own), peaks.amax(0))[1])
        scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype, partition=partition)
        outputs.append(scheme.apply(layer, part, tp_rank=rank).to(torch.float32))
        assert len(asked) == 1, "one reduction for each call"
        assert torch.equal(asked[0], peaks[rank])
    tolerance = torch.finfo(dtype).eps * size
    torch.testing.assert_close(
        sum(outputs), whole.to(torch.float32), rtol=tolerance, atol=whole.abs().sum().item() / 1e5
    )
    assert not sum(outputs)[2:3].any()

    last = Partition("row", size - 1, size, lambda own: own * 2)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, [stored], dtype=dtype, partition=last)
    compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager")
    assert torch.equal(compiled(parts[-1]), scheme.apply(layer, parts[-1]))


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 9))


@pytest.mark.usefixtures("each_gemm")
@settings(max_examples=50)
@given(SHAPES, st.integers(0, 2**30))
def test_tensor_parallel_outputs(make: Any, workbench: Any, shape: tuple[int, list[int], int], seed: int) -> None:
    """Exactly one rank's side by side; a row-parallel rank quantises its slice with a scale of its own."""
    torch.manual_seed(seed)
    size, outputs, width = shape
    members = [make["W8A8_DYNAMIC"](n * size, width * size) for n in outputs]
    x = torch.cat([exact_codes_input(3, width, torch.float32) for _ in range(size)], dim=-1)
    scheme, layer = workbench.serve(AscendW8A8DynamicLinearMethod, members)
    parts = workbench.run_ranks(AscendW8A8DynamicLinearMethod, members, x, "column", size)
    assert torch.equal(parts, scheme.apply(layer, x))
    summed = workbench.run_ranks(AscendW8A8DynamicLinearMethod, members, x, "row", size)
    exact = 0
    for rank in range(size):
        cut = slice(rank * width, (rank + 1) * width)
        local = [{**member, "weight": member["weight"][:, cut]} for member in members]
        exact = exact + torch.cat([exact_output(x[:, cut], member) for member in local], dim=-1)
    torch.testing.assert_close(summed.to(torch.float64), exact, rtol=1e-5, atol=1e-3)
    # These slices have exact codes of their own, so the sum is the float layer's output.
    weight = torch.cat([m["weight"] * m["weight_scale"].to(torch.float64) for m in members])
    torch.testing.assert_close(exact, x.to(torch.float64) @ weight.t())
