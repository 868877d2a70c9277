"""W8A16: weight only, per channel or per group, symmetric or not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LimitError, Partition
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.verify import linear_params

INPUTS = 64


def exact_weight(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(q - weight_offset) · weight_scale in float64, every factor in the model's dtype as the operator has it."""
    weight = stored["weight"].to(torch.float64)
    group = torch.arange(weight.shape[1]) * stored["weight_scale"].shape[1] // weight.shape[1]
    scale = stored["weight_scale"].to(dtype).to(torch.float64)[:, group]
    offset = stored.get("weight_offset", torch.zeros(1, 1)).to(torch.float64)
    offset = offset[:, group] if offset.numel() > 1 else offset
    return ((weight - offset).to(dtype).to(torch.float64) * scale).to(dtype).to(torch.float64)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Equal to x @ weightᵀ + bias up to float32 sums and one rounding to x's dtype."""
    exact = x.to(torch.float64) @ weight.t() + (0 if bias is None else bias.to(torch.float64))
    magnitude = x.to(torch.float64).abs() @ weight.abs().t()
    tolerance = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-20 * magnitude
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("offset", ["none", "zero", "asymmetric"])
def test_the_formula(
    make: Any, workbench: Any, dtype: torch.dtype, stored_dtype: torch.dtype, groups: int, offset: str
) -> None:
    """The operator adds what the checkpoint subtracts."""
    options = {"asymmetric": offset == "asymmetric", "offset": offset != "none", "model": stored_dtype}
    members = [make["W8A16"](out, INPUTS, groups, **options) for out in (24, 8)]
    scheme, layer = workbench.serve(AscendW8A16LinearMethod, members, dtype=dtype)
    x, bias = torch.randn(7, INPUTS).to(dtype), torch.randn(32).to(dtype)
    weight = torch.cat([exact_weight(member, dtype) for member in members])
    check(scheme.apply(layer, x), x, weight)
    check(scheme.apply(layer, x, bias), x, weight, bias)


def test_a_single_weight_by_hand(workbench: Any) -> None:
    """(10 - 3) · 2 · 5 = 70."""
    stored = {
        "weight": torch.tensor([[10]], dtype=torch.int8),
        "weight_scale": torch.tensor([[2.0]]),
        "weight_offset": torch.tensor([[3.0]]),
    }
    scheme = AscendW8A16LinearMethod.create(workbench.context([stored], scheme_class=AscendW8A16LinearMethod))
    layer = workbench.load(scheme, [stored])
    assert scheme.dequantize(layer).tolist() == [[14.0]]
    scheme.process_weights_after_loading(layer)
    assert scheme.apply(layer, torch.tensor([[5.0]])).item() == 70.0


@pytest.mark.parametrize("groups", [1, 4])
def test_dequantize_is_the_formula(make: Any, workbench: Any, groups: int) -> None:
    stored = make["W8A16"](24, INPUTS, groups, asymmetric=True)
    scheme = AscendW8A16LinearMethod.create(workbench.context([stored], scheme_class=AscendW8A16LinearMethod))
    got = scheme.dequantize(workbench.load(scheme, [stored]))
    torch.testing.assert_close(got.to(torch.float64), exact_weight(stored, torch.float32))


def test_the_run_time_form(make: Any, workbench: Any) -> None:
    stored = make["W8A16"](24, INPUTS, 4, asymmetric=True)
    _, layer = workbench.serve(AscendW8A16LinearMethod, [stored, stored], dtype=torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((INPUTS, 48), torch.int8),
        "weight_scale": ((4, 48), torch.bfloat16),
        "weight_offset": ((4, 48), torch.bfloat16),
    }
    assert torch.equal(layer.weight_offset[:, :24], -stored["weight_offset"].t().to(torch.bfloat16))
    assert layer.weight_scale.is_contiguous()


def test_groups_of_unequal_length_are_refused(workbench: Any) -> None:
    stored = {"weight": torch.zeros(8, INPUTS, dtype=torch.int8), "weight_scale": torch.ones(8, 3)}
    assert AscendW8A16LinearMethod.can_serve(workbench.context([stored], scheme_class=AscendW8A16LinearMethod)) == [
        "64 input features cannot be cut into 3 equal groups: m0.weight_scale in model.safetensors is [8, 3], "
        "expected [8, a divisor of 64]; groups of 16 or 32 input features would fit"
    ]


SHAPES = st.tuples(
    st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([4, 32])
)


@settings(max_examples=50)
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 2**30))
def test_tensor_parallel_outputs_are_those_of_one_rank(
    make: Any, workbench: Any, shape: tuple[int, list[int], int, int], asymmetric: bool, grouped: bool, seed: int
) -> None:
    """With whole groups on each rank, down to a single one."""
    torch.manual_seed(seed)
    size, outputs, groups, length = shape
    inputs = size * groups * length
    members = [make["W8A16"](n * size, inputs, inputs // length if grouped else 1, asymmetric) for n in outputs]
    x = torch.randn(3, inputs)
    weight = torch.cat([exact_weight(member, torch.float32) for member in members])
    for kind in ("column", "row"):
        check(workbench.run_ranks(AscendW8A16LinearMethod, members, x, kind, size), x, weight)


def test_a_cut_through_a_group_names_a_size_that_works(make: Any, workbench: Any) -> None:
    """6 groups of 16: the weight's 96 input features could be cut over 4 ranks, the groups only over 3."""
    members = [make["W8A16"](8, 96, 6)]
    context = workbench.context(members, partition=Partition("row", 0, 4), scheme_class=AscendW8A16LinearMethod)
    scheme = AscendW8A16LinearMethod.create(context)
    with pytest.raises(LimitError) as raised:
        layouts_of(linear_params(scheme), context)
    message = str(raised.value)
    assert "layers.0.proj: weight_scale cannot be cut over 4 tensor-parallel ranks" in message
    assert "found: 96 input features" in message
    assert "multiples of 16" in message
    assert "use tensor_parallel_size 3" in message
    x = torch.randn(2, 96)
    got = workbench.run_ranks(AscendW8A16LinearMethod, members, x, "row", 3)
    check(got, x, exact_weight(members[0], torch.float32))


@given(st.integers(0, 2**30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
def test_quantising_loses_half_a_step_of_each_group(
    workbench: Any, make: Any, seed: int, rows: int, groups: int, length: int
) -> None:
    """And what it returns is what is declared, also in groups."""
    weight = torch.randn(rows, groups * length, generator=torch.Generator().manual_seed(seed))
    weight *= 10.0 ** torch.arange(groups).repeat_interleave(length)  # one scale for all would lose the first groups
    plan = make["W8A16"](rows, groups * length, groups)
    scheme = AscendW8A16LinearMethod.create(workbench.context([plan], scheme_class=AscendW8A16LinearMethod))
    stored = scheme.quantize(weight)
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    error = (scheme.dequantize(layer) - weight).abs()
    assert bool((error <= stored["weight_scale"].repeat_interleave(length, 1) * (0.5 + 1e-5)).all())


class Arguments(TorchDispatchMode):
    """Records the arguments of the operators of the namespace npu, by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            names = [argument.name for argument in func._schema.arguments]
            self.recorded = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_beside_bfloat16_is_handed_over_in_float32(make: Any, workbench: Any, dtype: torch.dtype) -> None:
    """The device's rule; beside float16 it stays as it is."""
    scheme, layer = workbench.serve(AscendW8A16LinearMethod, [make["W8A16"](8, INPUTS)], dtype=dtype)
    bias = torch.randn(8).to(dtype)
    with Arguments() as arguments:
        got = scheme.apply(layer, torch.zeros(1, INPUTS, dtype=dtype), bias)
    assert torch.equal(got[0], bias)
    assert arguments.recorded["bias"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
