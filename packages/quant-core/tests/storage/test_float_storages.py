"""FP8 per tensor and in blocks, NVFP4, and rounding to their values, against the definitions."""

from typing import Any

import pytest
import torch
from bits import e2m1
from float_modules import FP8, NVFP4, fp8_module, nvfp4
from hypothesis import given
from hypothesis import strategies as st
from mx_reference import nearest

from quant_core import StoredForm, WeightForm
from quant_core import microscaling as mx
from quant_core.storage import FP8Storage, NVFP4Storage


def test_every_float_is_rounded_to_the_nearest_value() -> None:
    """All float16 values, and the neighbours of every tie in float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).to(torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    ties = (codes[:, None] + codes[None, :]).flatten() / 2
    near = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), torch.tensor([3e38, 1e-45, -0.0])])
    values = torch.cat([every[every.isfinite()], near[near.isfinite()]])
    for found, fp4 in ((mx.nearest_e4m3(values), False), (mx.nearest_e2m1(values), True)):
        assert torch.equal(found.to(torch.float64), nearest(values.to(torch.float64), fp4, ties_away=False))
    assert torch.equal(mx.nearest_e4m3(values), values.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32))
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert mx.nearest_e4m3(odd)[0].isnan()
    assert mx.nearest_e2m1(odd)[1:].tolist() == [6, -6]


@pytest.mark.parametrize(("out", "inputs", "block"), [(7, 50, (3, 24)), (4, 24, (128, 128)), (256, 130, (128, 128))])
def test_a_block_shares_a_scale(out: int, inputs: int, block: tuple[int, int]) -> None:
    """As handed over: the scales of a row's blocks, for each row."""
    module = fp8_module(out, inputs, "block", block=block)
    storage = FP8Storage(StoredForm(weight=module.weight), FP8["block"])
    rows = torch.stack([module["weight_scale"][row // block[0]] for row in range(out)])
    got = storage.dequantize({"weight": module["weight"], "weight_scale": rows}).to(torch.float64)
    exact = torch.empty(out, inputs, dtype=torch.float64)
    for row in range(out):
        for column in range(inputs):
            scale = float(module["weight_scale"][row // block[0], column // block[1]])
            exact[row, column] = float(module["weight"][row, column]) * scale
    torch.testing.assert_close(got, exact, rtol=1e-7, atol=0)


@given(st.sampled_from(["tensor", "channel", "block"]), st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**30))
def test_quantising_fp8_loses_half_a_step(workbench: Any, strategy: str, out: int, inputs: int, seed: int) -> None:
    form, weight = FP8[strategy], torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    storage = FP8Storage(StoredForm(), form)
    stored = storage.quantize(weight)
    declared = storage.get_weight(inputs, out) | storage.get_pergroup_param(inputs, out)
    assert {n: (p.shape, p.dtype) for n, p in declared.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in stored.items()
    }
    scale = stored["weight_scale"]
    if strategy == "block":
        scale = scale.repeat_interleave(2, 0)[:out]
    got = storage.dequantize({"weight": stored["weight"], "weight_scale": scale.expand(out, -1)})
    each = scale.expand(out, -1).repeat_interleave(24 if strategy == "block" else inputs, 1)[:, :inputs]
    step = torch.maximum(weight.abs() / 16, each * 2**-10)
    assert bool(((got - weight).abs() <= step * (1 + 1e-5)).all())


def test_nvfp4_is_divided_by_the_scale_of_the_tensor() -> None:
    module = nvfp4(5, 48)
    storage = NVFP4Storage(StoredForm(weight=NVFP4), NVFP4)
    handed = module | {"weight_global_scale": module["weight_global_scale"].expand(5, 1)}
    values = e2m1(module["weight"]).to(torch.float64)
    scale = module["weight_scale"].to(torch.float64).repeat_interleave(16, 1)
    exact = values * scale / module["weight_global_scale"].to(torch.float64)
    torch.testing.assert_close(storage.dequantize(handed).to(torch.float64), exact, rtol=3e-7, atol=0)


def test_quantising_to_nvfp4() -> None:
    """At most half a step between 4 and 6, of the group's rounded scale; a zero weight stays zero."""
    weight = torch.randn(7, 64) * 10.0 ** torch.randint(-2, 2, (7, 1))
    weight[0], weight[1, :16] = 0, 0
    storage = NVFP4Storage(StoredForm(), NVFP4)
    for one in (weight, torch.zeros(2, 32)):
        stored = storage.quantize(one)
        rows = one.shape[0]
        handed = stored | {"weight_global_scale": stored["weight_global_scale"].expand(rows, 1)}
        error = (storage.dequantize(handed) - one).unflatten(1, (-1, 16)).abs().amax(-1)
        peaks = one.unflatten(1, (-1, 16)).abs().amax(-1)
        smallest = 6 * 2**-9 / stored["weight_global_scale"]  # what a group needs to have a scale
        assert bool((error <= peaks * 1.07 / 6 + smallest).all())
        assert not storage.dequantize(handed)[one == 0].any()


def test_forms_that_are_no_nvfp4_or_fp8() -> None:
    for change in ({"group_size": 32}, {"outer": None}, {"packing": None}):
        form = WeightForm(**{name: getattr(NVFP4, name) for name in NVFP4.__slots__} | change)
        assert not NVFP4Storage(StoredForm(weight=form), NVFP4).keeps()
    for form in (WeightForm(type="float", strategy="block"), WeightForm(type="float", strategy="group", group_size=8)):
        assert not FP8Storage(StoredForm(weight=form), FP8["channel"]).keeps()
    (reason,) = NVFP4Storage(StoredForm(), NVFP4).reasons_against(40)
    assert reason == "40 input features cannot be cut into 3 equal groups"
