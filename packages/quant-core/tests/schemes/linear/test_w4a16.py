"""W4A16: packings, offsets, groups, run-time forms."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bits import unpack_eights, unpack_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import w4a16
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.linear.w4a16 import AscendW4A16LinearMethod
from quant_core.schemes.verify import linear_params, verify_stored

INPUTS = 72
AXES = {"k": 1, "n": 0, "none": None}


def exact_weight(stored: dict[str, Tensor], axis: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(q - weight_offset) · weight_scale in float64, every factor in the model's dtype as the operator has it."""
    codes = stored["weight"] if axis is None else unpack_pairs(stored["weight"], axis)
    group = torch.arange(codes.shape[1]) * stored["weight_scale"].shape[1] // codes.shape[1]
    scale = stored["weight_scale"].to(dtype).to(torch.float64)[:, group]
    offset = stored["weight_offset"].to(torch.float64)[:, group]
    return ((codes.to(torch.float64) - offset) * scale).to(dtype).to(torch.float64)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Equal to x @ weightᵀ + bias up to float32 sums and one rounding to x's dtype."""
    exact = x.to(torch.float64) @ weight.t() + (0 if bias is None else bias.to(torch.float64))
    magnitude = x.to(torch.float64).abs() @ weight.abs().t()
    tolerance = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-20 * magnitude
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


@pytest.fixture(params=["cpu", "910B"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose run-time form the weight takes."""
    with planned_device(request.param):
        yield request.param


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "packed", "axis"), [(1, True, 1), (1, False, None), (3, True, 0), (9, False, None)])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_the_formula(
    workbench: Any, dtype: torch.dtype, groups: int, packed: bool, axis: int | None, asymmetric: bool
) -> None:
    """The operator adds what the checkpoint subtracts, whatever the packing."""
    members = [w4a16(out, INPUTS, groups, asymmetric, packed=packed) for out in (24, 8)]
    scheme, layer = workbench.serve(AscendW4A16LinearMethod, members, dtype=dtype, inputs=INPUTS, sizes=(24, 8))
    x, bias = torch.randn(7, INPUTS).to(dtype), torch.randn(32).to(dtype)
    weight = torch.cat([exact_weight(member, axis, dtype) for member in members])
    check(scheme.apply(layer, x), x, weight)
    check(scheme.apply(layer, x, bias), x, weight, bias)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("tokens", [0, 1, 33000])
def test_any_number_of_tokens_and_zero_rows(workbench: Any, tokens: int) -> None:
    stored = w4a16(8, 16, asymmetric=True)
    scheme, layer = workbench.serve(AscendW4A16LinearMethod, [stored])
    x = torch.randn(tokens, 16)
    x[::3] = 0
    got = scheme.apply(layer, x)
    assert got.shape == (tokens, 8)
    assert not got[::3].any()
    check(got, x, exact_weight(stored, 1))


def test_a_single_byte_by_hand(workbench: Any) -> None:
    """Low nibble 3, high nibble -2: (3 - 1) · 2 · 5 + (-2 - 1) · 2 · 7 = -22."""
    stored = {
        "weight": torch.tensor([[0xE3 - 256]]).to(torch.int8),
        "weight_scale": torch.tensor([[2.0]]),
        "weight_offset": torch.tensor([[1.0]]),
    }
    scheme = AscendW4A16LinearMethod.create(workbench.context([stored], inputs=2, scheme_class=AscendW4A16LinearMethod))
    layer = workbench.load(scheme, [stored])
    assert scheme.dequantize(layer).tolist() == [[4.0, -6.0]]
    scheme.process_weights_after_loading(layer)
    assert scheme.apply(layer, torch.tensor([[5.0, 7.0]])).item() == -22.0


@pytest.mark.parametrize(
    ("product", "out"), [("910B", 24), ("910C", 24), ("950", 24), ("310P", 24), ("cpu", 24), ("910B", 12)]
)
def test_the_run_time_form(workbench: Any, product: str, out: int) -> None:
    """int4 where the product multiplies it and the rows fill int32."""
    stored = w4a16(out, INPUTS, 3)
    with planned_device(product):
        _, layer = workbench.serve(AscendW4A16LinearMethod, [stored], dtype=torch.float16)
    packed = product in {"910B", "910C", "950"} and out % 8 == 0
    codes = unpack_pairs(stored["weight"], 0)
    assert layer.weight.dtype == (torch.int32 if packed else torch.int8)
    assert torch.equal(unpack_eights(layer.weight) if packed else layer.weight, codes.t())
    assert not packed or layer.weight.is_contiguous()
    assert torch.equal(layer.weight_scale, stored["weight_scale"].t().to(torch.float16))


@pytest.mark.parametrize(
    ("stored", "inputs", "told"),
    [
        (w4a16(6, 64), 64, (64, 6)),
        (w4a16(6, 64, 4), 64, (64, 6)),
        (w4a16(6, 64, 4, packed=False), 64, (64, 6)),
        (w4a16(6, 64, packed=False), 64, (64, 6)),
    ],
)
def test_the_packing_is_what_the_format_states(
    workbench: Any, stored: dict[str, Tensor], inputs: int, told: tuple[int, int]
) -> None:
    context = workbench.context([stored], inputs=inputs, sizes=(6,), scheme_class=AscendW4A16LinearMethod)
    verify_stored(AscendW4A16LinearMethod.create(context))
    assert context.form.sizes() == told


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3))


@settings(max_examples=40)
@given(SHAPES, st.sampled_from(["k", "n", "none"]), st.sampled_from(["cpu", "910B"]), st.integers(0, 2**30))
def test_tensor_parallel_outputs_are_those_of_one_rank(
    workbench: Any, shape: tuple[int, list[int], int], packing: str, device: str, seed: int
) -> None:
    torch.manual_seed(seed)
    size, outputs, length = shape
    groups = 1 if packing == "k" else 2 * size
    inputs, sizes = 4 * size * length, [2 * size * n for n in outputs]
    members = [w4a16(n, inputs, groups, True, packed=packing != "none") for n in sizes]
    x, weight = torch.randn(3, inputs), torch.cat([exact_weight(m, AXES[packing]) for m in members])
    for kind in ("column", "row"):
        with planned_device(device):
            got = workbench.run_ranks(AscendW4A16LinearMethod, members, x, kind, size, inputs=inputs, sizes=sizes)
        check(got, x, weight)


@pytest.mark.parametrize(
    ("stored", "kind", "found", "works"),
    [
        (w4a16(8, 12), "row", "12 input features", 3),  # pairs of k: 12 / 4 = 3 is odd
        (w4a16(12, 8, 2), "column", "3 of 12 output features", 3),  # pairs of rows
        (w4a16(8, 96, 6), "row", "96 input features", 3),  # groups of 16
    ],
)
def test_a_cut_through_a_byte_or_a_group_names_a_size_that_works(
    workbench: Any, stored: dict[str, Tensor], kind: Any, found: str, works: int
) -> None:
    context = workbench.context([stored], partition=Partition(kind, 0, 4), scheme_class=AscendW4A16LinearMethod)
    scheme = AscendW4A16LinearMethod.create(context)
    with pytest.raises(LimitError) as raised:
        layouts_of(linear_params(scheme), context)
    assert found in str(raised.value)
    assert f"use tensor_parallel_size {works}" in str(raised.value)


@given(
    st.integers(0, 2**30), st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.sampled_from(["k", "n", "none"])
)
def test_quantising_loses_half_a_step_of_each_group(
    workbench: Any, seed: int, rows: int, groups: int, length: int, packing: str
) -> None:
    """And what it returns is what is declared, in every packing."""
    if packing == "k":
        groups, length = 1, 2 * length
    rows = 2 * rows if packing == "n" else rows
    groups = 2 if packing == "n" and groups == 1 else groups  # one group is packed along k
    weight = torch.randn(rows, groups * length, generator=torch.Generator().manual_seed(seed))
    weight *= 10.0 ** torch.arange(groups).repeat_interleave(length)
    plan = w4a16(rows, groups * length, groups, packed=packing != "none")
    context = workbench.context([plan], inputs=groups * length, sizes=(rows,), scheme_class=AscendW4A16LinearMethod)
    scheme = AscendW4A16LinearMethod.create(context)
    stored = scheme.quantize(weight)
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    error = (scheme.dequantize(layer) - weight).abs()
    assert bool((error <= stored["weight_scale"].repeat_interleave(length, 1) * (0.5 + 1e-5)).all())


@pytest.mark.parametrize("inputs", [7, 8])
def test_what_no_format_states_is_not_packed(workbench: Any, inputs: int) -> None:
    context = workbench.context([{"weight": torch.zeros(6, inputs)}], sizes=(6,), inputs=inputs)
    scheme = AscendW4A16LinearMethod.create(type(context)(**{**vars(context), "stored": ()}))
    stored = scheme.quantize(torch.randn(6, inputs))
    assert stored["weight"].shape == (6, inputs)
    workbench.load(scheme, [stored])  # asserts shapes and dtypes
