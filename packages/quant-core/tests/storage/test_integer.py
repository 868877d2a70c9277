"""Integer weights: the plain quantiser, and the form that goes to the operators."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import StoredForm, WeightForm
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.run_time import process_int8_weight
from quant_core.storage import IntegerStorage

INT8 = IntegerStorage(StoredForm(), WeightForm())


@given(st.integers(0, 2**30), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1e-20, 1.0, 1e20]))
def test_codes_are_half_a_step_from_the_weight(seed: int, rows: int, columns: int, size: float) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    stored = INT8.quantize(weight)
    codes, scale = stored["weight"], stored["weight_scale"]
    error = (codes.to(torch.float64) * scale.to(torch.float64) - weight.to(torch.float64)).abs()
    assert codes.dtype == torch.int8
    assert scale.shape == (rows, 1)
    assert bool((error <= scale.to(torch.float64) * (0.5 + 1e-5)).all())
    assert codes.abs().amax(1).eq(127).all(), "the whole range is used"


def test_a_channel_of_zeros_has_the_scale_one() -> None:
    weight = torch.zeros(2, 4)
    weight[1] = 3
    stored = INT8.quantize(weight)
    assert stored["weight_scale"].tolist() == [[1.0], [torch.tensor(3 / 127).item()]]
    assert stored["weight"].tolist() == [[0] * 4, [127] * 4]


def test_codes_round_ties_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, 127.0, -127.0]])
    assert INT8.quantize(weight)["weight"].tolist() == [[0, 2, 0, 127, -127]]


def test_the_declared_weight() -> None:
    (param,) = INT8.get_weight(16, 8).values()
    assert (param.shape, param.dtype, param.output_dim, param.input_dim) == ((8, 16), torch.int8, 0, 1)


def test_the_weight_is_transposed_by_its_strides() -> None:
    layer, stored = nn.Module(), torch.randint(-9, 9, (8, 16), dtype=torch.int8)
    replace_parameter(layer, "weight", stored)
    process_int8_weight(layer, stored)
    weight = layer.get_parameter("weight")
    assert torch.equal(weight, stored.t())
    assert weight.stride() == (1, 16)
    assert weight.data_ptr() == stored.data_ptr(), "on CPU, a copy would be one more in memory"


def test_a_device_with_layouts_is_asked_for_its_own() -> None:
    """The meta device stands in for one."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    layer = nn.Module()
    replace_parameter(layer, "weight", torch.zeros(8, 16, dtype=torch.int8, device="meta"))
    with Calls():
        process_int8_weight(layer, layer.get_parameter("weight").data)
    assert "npu.npu_format_cast.default" in called
    assert layer.get_parameter("weight").shape == (16, 8)
