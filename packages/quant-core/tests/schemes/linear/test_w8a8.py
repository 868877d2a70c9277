"""W8A8: static activation scales, the bias inside quant_bias."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LimitError, LoadError, Partition
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.verify import check_values

INPUTS = 64


def exact_output(x: Tensor, stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(a qᵀ + quant_bias) · deq_scale in float64; the scale as the matmul unit has it for float16 results."""
    scale, offset = (stored[name].to(torch.float64) for name in ("input_scale", "input_offset"))
    codes = torch.round(x.to(torch.float64) / scale + offset).clamp(-128, 127)
    deq = stored["deq_scale"]
    deq = (deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq).to(torch.float64)
    if dtype == torch.float16:
        mantissa, exponent = torch.frexp(deq)
        deq = torch.ldexp(torch.trunc(mantissa * 2**11) / 2**11, exponent)
    return (codes @ stored["weight"].to(torch.float64).t() + stored["quant_bias"]) * deq


def check(got: Tensor, exact: Tensor) -> None:
    """Equal up to one rounding to the output's dtype."""
    torch.testing.assert_close(got.to(torch.float64), exact, rtol=torch.finfo(got.dtype).eps / 2 + 2**-21, atol=1e-6)


@pytest.mark.usefixtures("each_gemm")
@pytest.mark.parametrize("offset", [-128.0, -7.0, 0.0, 127.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deq", [torch.float32, torch.int64])
def test_the_formula(make: Any, workbench: Any, offset: float, dtype: torch.dtype, deq: torch.dtype) -> None:
    """Inputs and their scale are multiples of powers of two, so that codes are exact; ties and saturation included."""
    stored = make["W8A8"](24, INPUTS, input_scale=2**-5, input_offset=offset, deq=deq)
    scheme, layer = workbench.serve(AscendW8A8LinearMethod, [stored], dtype=dtype)
    x = (torch.randint(-600, 600, (9, INPUTS)) / 64).to(dtype)  # bfloat16 rounds some of them, before all else
    check(scheme.apply(layer, x), exact_output(x, stored, dtype))


def test_the_bias_is_folded_in_and_not_added_again(workbench: Any) -> None:
    """From float weights by the writer's formulas to the float layer's output."""
    weight, bias, x = torch.randn(24, INPUTS) / 8, torch.randn(24) * 3, torch.randn(16, INPUTS).clamp(-2.5, 3.5)
    input_scale, input_offset = 6.0 / 255, -22.0
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None])
    deq_scale = input_scale * scale
    stored = {
        "weight": codes.to(torch.int8),
        "input_scale": torch.tensor([input_scale]),
        "input_offset": torch.tensor([input_offset]),
        "deq_scale": deq_scale,
        "quant_bias": torch.round(bias / deq_scale - input_offset * codes.sum(1)).to(torch.int32),
    }
    scheme, layer = workbench.serve(AscendW8A8LinearMethod, [stored], has_bias=True)
    y = scheme.apply(layer, x, bias)
    assert AscendW8A8LinearMethod.folds_bias
    exact = x.to(torch.float64) @ weight.to(torch.float64).t() + bias
    assert (y - exact).abs().max() < 0.08  # and the bias is 3
    assert torch.equal(y, scheme.apply(layer, x))


class Calls(TorchDispatchMode):
    """Counts the operators of the namespace npu."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scales", "runs"), [("aaa", 1), ("aab", 2), ("abb", 2), ("abc", 3), ("aba", 3), ("a", 1)])
@pytest.mark.parametrize("differing", ["input_scale", "input_offset"])
def test_members_with_one_input_scale_are_computed_together(
    make: Any, workbench: Any, scales: str, runs: int, differing: str
) -> None:
    values = {"input_scale": {"a": 2**-5, "b": 2**-4, "c": 2**-6}, "input_offset": {"a": 0.0, "b": -3.0, "c": 5.0}}
    members = [
        make["W8A8"](8 * (i + 1), INPUTS, **{"input_scale": 2**-5, differing: values[differing][s]})
        for i, s in enumerate(scales)
    ]
    scheme, layer = workbench.serve(AscendW8A8LinearMethod, members)
    assert layer.input_scale.shape == layer.input_offset.shape == (runs,)
    x = torch.randint(-100, 100, (5, INPUTS)) / 32
    with Calls() as calls:
        got = scheme.apply(layer, x)
    assert calls.names == ["npu_quantize", "npu_quant_matmul"] * runs
    assert got.shape == (5, sum(member["weight"].shape[0] for member in members))
    for part, member in zip(got.split([m["weight"].shape[0] for m in members], -1), members, strict=True):
        check(part, exact_output(x, member, torch.float32))


@pytest.mark.parametrize(
    ("dtype", "held"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.int64)]
)
@pytest.mark.parametrize("deq", [torch.float32, torch.int64])
def test_the_run_time_form(make: Any, workbench: Any, dtype: torch.dtype, held: torch.dtype, deq: torch.dtype) -> None:
    """Decided by the serving dtype; the stored dtype says how to read it."""
    stored = make["W8A8"](24, INPUTS, deq=deq, weight_scale=True)
    _, layer = workbench.serve(AscendW8A8LinearMethod, [stored], dtype=dtype)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((INPUTS, 24), torch.int8),
        "input_scale": ((1,), torch.float32),
        "input_offset": ((1,), torch.float32),
        "deq_scale": ((24,), held),
        "quant_bias": ((24,), torch.int32),
    }
    assert torch.equal(layer.weight, stored["weight"].t())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_a_zero_point_in_any_stored_dtype(make: Any, workbench: Any, dtype: torch.dtype) -> None:
    stored = make["W8A8"](8, INPUTS, input_scale=2**-5, input_offset=-100.0)
    x = torch.randint(-600, 600, (4, INPUTS)) / 64
    scheme, layer = workbench.serve(
        AscendW8A8LinearMethod, [{**stored, "input_offset": stored["input_offset"].to(dtype)}]
    )
    check(scheme.apply(layer, x), exact_output(x, stored, torch.float32))


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 9))


@pytest.mark.usefixtures("each_gemm")
@settings(max_examples=50)
@given(SHAPES, st.booleans(), st.integers(0, 2**30))
def test_tensor_parallel_outputs_are_those_of_one_rank(
    make: Any, workbench: Any, shape: tuple[int, list[int], int], distinct: bool, seed: int
) -> None:
    """Exactly so side by side; as a sum over row-parallel ranks up to float32, with quant_bias in it once."""
    torch.manual_seed(seed)
    size, outputs, width = shape
    members = [
        make["W8A8"](n * size, width * size, input_scale=2**-5 * (i + 1 if distinct else 1))
        for i, n in enumerate(outputs)
    ]
    x = torch.randn(3, width * size) * 2
    scheme, layer = workbench.serve(AscendW8A8LinearMethod, members)
    whole = scheme.apply(layer, x)
    assert torch.equal(workbench.run_ranks(AscendW8A8LinearMethod, members, x, "column", size), whole)
    rows = workbench.run_ranks(AscendW8A8LinearMethod, members, x, "row", size)
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-4)


def test_quant_bias_is_on_the_first_row_parallel_rank_only(make: Any, workbench: Any) -> None:
    stored = make["W8A8"](8, INPUTS)
    for kind, holders in (("row", [0]), ("replicated", [0, 1, 2, 3])):
        for rank in range(4):
            _, layer = workbench.serve(AscendW8A8LinearMethod, [stored], partition=Partition(kind, rank, 4))
            want = stored["quant_bias"] if rank in holders else torch.zeros(8, dtype=torch.int32)
            assert torch.equal(layer.quant_bias, want)


def test_a_reload_that_shares_input_scales_otherwise_is_refused(make: Any, workbench: Any) -> None:
    """Compiled code has baked in which rows go together."""
    same = [make["W8A8"](8, INPUTS) for _ in range(2)]
    distinct = [make["W8A8"](8, INPUTS, input_scale=0.01 * (i + 1)) for i in range(2)]
    scheme = AscendW8A8LinearMethod.create(workbench.context(same, scheme_class=AscendW8A8LinearMethod))
    scheme.process_weights_after_loading(workbench.load(scheme, same))
    with pytest.raises(LimitError) as raised:
        scheme.process_weights_after_loading(workbench.load(scheme, distinct))
    message = str(raised.value)
    assert "layers.0.proj: the reloaded weights share their input scales among other members than before" in message
    assert "found: rows [(0, 8), (8, 16)]" in message
    assert "expected: rows [(0, 16)]" in message
    scheme.process_weights_after_loading(workbench.load(scheme, same))


def test_scales_that_come_later_are_shared_by_nobody(make: Any, workbench: Any) -> None:
    """Whatever the made-up ones say; equal real ones give the numbers of a layer that shares them, bit by bit."""
    same = [make["W8A8"](8, INPUTS) for _ in range(2)]
    distinct = [make["W8A8"](8, INPUTS, input_scale=0.01 * (i + 1)) for i in range(2)]
    context = replace(workbench.context(same, scheme_class=AscendW8A8LinearMethod), values_later=True)
    scheme = AscendW8A8LinearMethod.create(context)
    x = torch.randn(5, INPUTS)
    for members in (same, distinct, same):
        layer = workbench.load(scheme, members)
        scheme.process_weights_after_loading(layer)
        assert layer.input_scale.shape == (2,)
        fresh, expected = workbench.serve(AscendW8A8LinearMethod, members)
        assert torch.equal(scheme.apply(layer, x), fresh.apply(expected, x))


@pytest.mark.parametrize("kind", ["replicated", "row", "column"])
def test_what_the_tool_overflowed_is_computed_again(make: Any, workbench: Any, kind: str) -> None:
    """From bias, scale and codes, wherever the layer is cut; the rest stays as stored."""
    stored, size = make["W8A8"](8, INPUTS), 1 if kind == "replicated" else 2
    bias, lost = torch.randn(8) * 50, [2, 5]
    sums = stored["weight"].to(torch.int64).sum(1)
    right = torch.round(bias.double() / stored["deq_scale"].double() + 7 * sums).to(torch.int32)
    damaged = {**stored, "quant_bias": stored["quant_bias"].clone()}
    damaged["quant_bias"][lost] = -(2**31)
    total = torch.zeros(8, dtype=torch.int32)
    for rank in range(size):
        scheme = AscendW8A8LinearMethod.create(
            workbench.context(
                [damaged], partition=Partition(kind, rank, size), has_bias=True, scheme_class=AscendW8A8LinearMethod
            )
        )
        layer = workbench.load(scheme, [damaged])
        rows = slice(rank * 4, rank * 4 + 4) if kind == "column" else slice(0, 8)
        layer.register_parameter("bias", torch.nn.Parameter(bias[rows], requires_grad=False))
        scheme.process_weights_after_loading(layer)
        total[rows] += layer.quant_bias
    assert torch.equal(total[lost], right[lost])
    kept = [row for row in range(8) if row not in lost]
    assert torch.equal(total[kept], stored["quant_bias"][kept])


def test_what_the_tool_overflowed_without_a_bias(make: Any, workbench: Any) -> None:
    stored = make["W8A8"](8, INPUTS)
    stored["quant_bias"][[2, 5]] = -(2**31)
    scheme = AscendW8A8LinearMethod.create(workbench.context([stored], scheme_class=AscendW8A8LinearMethod))
    with pytest.raises(LoadError, match="2 of 8 values are -2147483648: the tool overflowed"):
        scheme.process_weights_after_loading(workbench.load(scheme, [stored]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_scale", 0.0), ("input_scale", float("inf")), ("input_offset", 0.5), ("input_offset", 200.0)],
)
def test_calibrated_values_that_cannot_be(make: Any, workbench: Any, name: str, value: float) -> None:
    scheme = AscendW8A8LinearMethod.create(
        workbench.context([make["W8A8"](8, INPUTS)], scheme_class=AscendW8A8LinearMethod)
    )
    with pytest.raises(LoadError, match=f"layers.0.proj: {name} cannot be used"):
        check_values("layers.0.proj", [f"m0.{name}"], scheme.params(INPUTS, 8)[name], torch.tensor([value]))


def test_it_cannot_quantise_without_calibration(workbench: Any, make: Any) -> None:
    scheme = AscendW8A8LinearMethod.create(
        workbench.context([make["W8A8"](8, INPUTS)], scheme_class=AscendW8A8LinearMethod)
    )
    with pytest.raises(NotImplementedError, match="needs calibration"):
        scheme.quantize(torch.randn(8, INPUTS))
