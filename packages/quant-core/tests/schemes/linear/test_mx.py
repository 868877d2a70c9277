"""What holds for the three types that differ in nothing but the numbers of their blocks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import e2m1
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_modules import mxfp4, mxfp8
from mx_reference import assert_near, microscaled, stored_weight
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.linear.w4a4_mxfp4 import AscendW4A4MXFP4LinearMethod
from quant_core.schemes.linear.w4a8_mxfp import AscendW4A8MXFPLinearMethod
from quant_core.schemes.linear.w8a8_mxfp8 import AscendW8A8MXFP8LinearMethod
from quant_core.schemes.mx import MXLinearScheme, run_time_weight
from quant_core.schemes.verify import linear_params


@dataclass(frozen=True)
class Type:
    """A type, a stored module of it, and whether its activations are FP4."""

    scheme: type[MXLinearScheme]
    make: Callable[[int, int], dict[str, Tensor]]
    fp4: bool

    def rounded(self, x: Tensor) -> Tensor:
        """Activations as the type sees them, in float64."""
        return microscaled(x, self.fp4, ties_away=self.fp4)


TYPES = {
    "W8A8_MXFP8": Type(AscendW8A8MXFP8LinearMethod, mxfp8, False),
    "W4A8_MXFP": Type(AscendW4A8MXFPLinearMethod, mxfp4, False),
    "W4A4_MXFP4": Type(AscendW4A4MXFP4LinearMethod, mxfp4, True),
}


@pytest.fixture(params=TYPES)
def kind(request: pytest.FixtureRequest) -> Type:
    """Each of the three."""
    return TYPES[request.param]


def serve(workbench: Any, kind: Type, members: list[dict[str, Tensor]], inputs: int, **options: Any) -> Any:
    """A scheme and its processed layer."""
    sizes = [member["weight"].shape[0] for member in members]
    return workbench.serve(kind.scheme, members, sizes=sizes, inputs=inputs, **options)


@pytest.mark.parametrize("inputs", [2, 32, 80, 96, 130])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula(kind: Type, workbench: Any, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    """With short last blocks and odd numbers of blocks, which are filled up for the operator."""
    members = [kind.make(out, inputs) for out in (24, 5)]
    scheme, layer = serve(workbench, kind, members, inputs, dtype=dtype)
    x, added = torch.randn(7, inputs).to(dtype), torch.randn(29).to(dtype) if bias else None
    weight = torch.cat([stored_weight(member) for member in members])
    assert_near(scheme.apply(layer, x, added), kind.rounded(x), weight, added)


@pytest.mark.parametrize("tokens", [0, 1, 7, 33000])
def test_any_number_of_tokens_of_any_size(kind: Type, workbench: Any, tokens: int) -> None:
    stored = kind.make(5, 80)
    scheme, layer = serve(workbench, kind, [stored], 80)
    x = torch.randn(tokens, 80) * 10.0 ** torch.randint(-20, 20, (tokens, 1))
    x[1::3] = 0
    got = scheme.apply(layer, x)
    assert_near(got, kind.rounded(x), stored_weight(stored))
    assert not got[1::3].any()


def test_a_block_of_zeros_beside_others(kind: Type, workbench: Any) -> None:
    stored = kind.make(5, 96)
    scheme, layer = serve(workbench, kind, [stored], 96)
    x = torch.randn(3, 96)
    x[:, 32:64] = 0
    assert_near(scheme.apply(layer, x), kind.rounded(x), stored_weight(stored))


def test_nan_and_infinity_are_not_hidden(kind: Type, workbench: Any) -> None:
    scheme, layer = serve(workbench, kind, [kind.make(5, 96)], 96)
    x = torch.randn(3, 96)
    x[0, 40], x[1, 40] = torch.nan, torch.inf
    got = scheme.apply(layer, x)
    assert bool(got[:2].isnan().all())
    assert bool(got[2].isfinite().all())


@pytest.mark.parametrize("device", ["950", "cpu"])
def test_the_run_time_form(kind: Type, workbench: Any, device: str) -> None:
    """The operator wants weight and exponents as views that are turned alike; on CPU the values are decoded."""
    stored = kind.make(24, 80)
    with planned_device(device):
        _, layer = serve(workbench, kind, [stored], 80)
    columns, dtype = stored["weight"].shape[1], stored["weight"].dtype
    if device == "cpu":
        columns, dtype = 80, torch.int8 if dtype == torch.uint8 else torch.bfloat16
    assert {name: (tuple(p.shape), p.dtype, p.stride()) for name, p in layer.named_parameters()} == {
        "weight": ((columns, 24), dtype, (1, columns)),
        "weight_scale": ((2, 24, 2), torch.uint8, (2, 4, 1)),
    }


def test_the_decoded_weight_has_the_values_of_every_code() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(16, 16)
    assert torch.equal(run_time_weight(codes), 2 * e2m1(codes).to(torch.float64))
    finite = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)[None]
    assert torch.equal(run_time_weight(finite), finite.to(torch.float32))


def test_beside_torch_npu_it_stays_with_the_codes(kind: Type, workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where there is no NPU: torch_npu's Meta kernels refuse the other form."""
    stored = kind.make(24, 80)
    nowhere = SimpleNamespace(npu=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch_npu", nowhere)
    _, layer = serve(workbench, kind, [stored], 80)
    assert layer.weight.dtype == stored["weight"].dtype


@pytest.mark.parametrize("tokens", [1, 5])
def test_both_run_time_forms_give_the_same(kind: Type, workbench: Any, tokens: int) -> None:
    stored, x, outputs = kind.make(70, 80), torch.randn(tokens, 80), []
    stored["weight_scale"][:2] = torch.tensor([[0], [254]])
    for device in ("950", "cpu"):
        with planned_device(device):
            scheme, layer = serve(workbench, kind, [stored], 80)
        outputs.append(scheme.apply(layer, x * 2.0**-20))
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)


def test_the_usual_form_is_declared_while_there_are_no_files(kind: Type, workbench: Any) -> None:
    stored = kind.make(24, 80)
    context = workbench.context([stored], sizes=[24], inputs=80)
    scheme = kind.scheme.create(type(context)(**{**vars(context), "stored": ()}))
    assert {name: (p.shape, p.dtype) for name, (p,) in linear_params(scheme).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()
    }


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3))


@settings(max_examples=30)
@given(st.sampled_from(list(TYPES)), SHAPES, st.integers(0, 2**30))
def test_tensor_parallel_outputs_are_those_of_one_rank(
    workbench: Any, name: str, shape: tuple[int, list[int], int], seed: int
) -> None:
    """Ranks hold whole blocks, of odd numbers too, so their activations have the exponents of one rank."""
    torch.manual_seed(seed)
    kind, (size, outputs, blocks) = TYPES[name], shape
    inputs = size * blocks * 32
    members = [kind.make(out * size, inputs) for out in outputs]
    sizes = [out * size for out in outputs]
    x = torch.randn(3, inputs) * 10.0 ** torch.arange(size).repeat_interleave(inputs // size)
    weight = torch.cat([stored_weight(member) for member in members])
    for cut in ("column", "row"):
        got = workbench.run_ranks(kind.scheme, members, x, cut, size, sizes=sizes, inputs=inputs)
        assert_near(got, kind.rounded(x), weight)


def test_the_bias_is_added_by_the_rank_that_is_given_it(kind: Type, workbench: Any) -> None:
    stored, x, bias = kind.make(8, 64), torch.randn(3, 64), torch.randn(8)
    total = torch.zeros(3, 8)
    for rank in range(2):
        scheme, layer = serve(workbench, kind, [stored], 64, partition=Partition("row", rank, 2))
        total += scheme.apply(layer, x.chunk(2, -1)[rank], bias if rank == 0 else None, tp_rank=rank)
    assert_near(total, kind.rounded(x), stored_weight(stored), bias)


@pytest.mark.parametrize(("inputs", "size", "works"), [(96, 2, 1), (192, 4, 3), (80, 2, 1)])
def test_a_cut_through_a_block_names_a_size_that_works(
    kind: Type, workbench: Any, inputs: int, size: int, works: int
) -> None:
    stored = kind.make(8, inputs)
    context = workbench.context([stored], sizes=[8], inputs=inputs, partition=Partition("row", 0, size))
    with pytest.raises(LimitError) as raised:
        layouts_of(linear_params(kind.scheme.create(context)), context)
    assert f"weight_scale cannot be cut over {size} tensor-parallel ranks" in str(raised.value)
    assert "multiples of 32" in str(raised.value)
    assert f"use tensor_parallel_size {works}" in str(raised.value)


def test_only_products_with_such_operators_serve_it(kind: Type, workbench: Any) -> None:
    context = workbench.context([kind.make(8, 64)], sizes=[8], inputs=64)
    for device, reasons in (("950", []), ("910B", ["needs one of the devices 950, cpu, this one is 910B"])):
        with planned_device(device):
            assert kind.scheme.can_serve(context) == reasons


def test_an_exponent_that_is_nan_is_refused(kind: Type, workbench: Any) -> None:
    scheme = kind.scheme.create(workbench.context([kind.make(8, 64)], sizes=[8], inputs=64, scheme_class=kind.scheme))
    check = scheme.params(64, 8)["weight_scale"].check
    assert check is not None
    assert check(torch.tensor([[0, 254]], dtype=torch.uint8)) is None
    assert check(torch.tensor([[0, 255]], dtype=torch.uint8)) == "1 of 2 exponents are NaN (255)"


@settings(max_examples=60)
@given(st.sampled_from(list(TYPES)), st.integers(0, 2**30), st.integers(1, 6), st.integers(1, 45), st.integers(-30, 30))
def test_quantising_loses_half_a_step(
    workbench: Any, name: str, seed: int, rows: int, half: int, magnitude: int
) -> None:
    """Of the block's largest step; and what it returns is what is declared."""
    kind, inputs = TYPES[name], 2 * half
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    weight[0, :32] = 0
    scheme = kind.scheme.create(
        workbench.context([kind.make(rows, inputs)], sizes=[rows], inputs=inputs, scheme_class=kind.scheme)
    )
    layer = workbench.load(scheme, [scheme.quantize(weight)])  # asserts shapes and dtypes
    found = scheme.dequantize(layer)
    assert not found[0, :32].any()
    for block, error in zip(weight.split(32, 1), (found - weight).abs().split(32, 1), strict=True):
        peak = block.abs().amax(1, keepdim=True)
        # FP4 has 1/4 to 1/7 of the peak as its last half step and is cut at 6 of 7; FP8 1/16, cut at 448 of 512.
        assert bool((error <= peak * (1 / 4 if scheme.storage.fp4 else 1 / 8)).all())


def test_a_quantised_layer_serves_the_float_one(kind: Type, workbench: Any) -> None:
    weight, x, bias = torch.randn(24, 128), torch.randn(50, 128), torch.randn(24)
    plan = kind.scheme.create(workbench.context([kind.make(24, 128)], sizes=[24], inputs=128, scheme_class=kind.scheme))
    scheme, layer = serve(workbench, kind, [plan.quantize(weight)], 128)
    exact = x @ weight.t() + bias
    assert (scheme.apply(layer, x, bias) - exact).norm() / exact.norm() < (0.18 if scheme.storage.fp4 else 0.05)
