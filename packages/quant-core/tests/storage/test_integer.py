"""Integer weights: the plain quantiser, and the form that goes to the operators."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integer_modules import offset_binary
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import Packing, StoredForm, StoredTensor, WeightForm
from quant_core.packing import pack, unpack
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


PER_TENSOR = WeightForm(strategy="tensor")
EIGHTS = Packing(1, values=8, signed=False)
ALONG_OUT = Packing(0, values=8, signed=False)


def stated(weight: WeightForm, **tensors: Any) -> IntegerStorage:
    """The storage of a module with headers of these (shape, dtype)."""
    held = {name: StoredTensor(f"m.{name}", shape, dtype, "f") for name, (shape, dtype) in tensors.items()}
    return IntegerStorage(StoredForm("m", held, weight), weight)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_scale_for_a_module_is_declared_as_it_is_stored(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = replace(PER_TENSOR, symmetric=False, offset_type="int")
    storage = stated(weight, weight_scale=(shape, dtype), weight_offset=(shape, torch.int8))
    params = storage.get_pergroup_param(16, 8)
    assert {name: (p.shape, p.dtype, p.per_row) for name, p in params.items()} == {
        "weight_scale": (shape, dtype, True),
        "weight_offset": (shape, torch.int8, True),
    }
    assert storage.keeps()
    assert params["weight_scale"].check is not None
    assert params["weight_scale"].check(torch.zeros(shape)) is not None


def test_a_tensor_s_largest_magnitude_uses_the_whole_range() -> None:
    values = torch.randn(6, 16)
    storage = IntegerStorage(StoredForm(), PER_TENSOR)
    stored = storage.quantize(values)
    assert stored["weight_scale"].shape == (1,)
    assert stored["weight"].abs().max() == 127
    error = (storage.dequantize(stored) - values).abs()
    assert error.max() <= stored["weight_scale"] * (0.5 + 1e-5)


def test_scales_of_a_tensor_have_no_second_stage() -> None:
    assert not IntegerStorage(StoredForm(), replace(PER_TENSOR, outer="channel")).keeps()


def test_integers_as_zero_points_must_be_there() -> None:
    """Who says that a weight has some, and lost them, has another weight."""
    weight = WeightForm(symmetric=False, offset_type="int")
    assert "weight_offset" in stated(weight, weight_scale=((8, 1), torch.float32)).get_pergroup_param(16, 8)
    symmetric = stated(WeightForm(), weight_scale=((8, 1), torch.float32))
    assert "weight_offset" not in symmetric.get_pergroup_param(16, 8)


@pytest.mark.parametrize("packing", [None, ALONG_OUT])
def test_zero_points_of_a_symmetric_type_are_zero(packing: Packing | None) -> None:
    """Some writers store them; a value that is not zero would be dropped."""
    weight = WeightForm(num_bits=4, offset_type="int", offset_packing=packing)
    offsets = torch.zeros(8, 2, dtype=torch.int8)
    held = pack(offsets, packing, 4)
    storage = stated(weight, weight_scale=((8, 2), torch.bfloat16), weight_offset=(tuple(held.shape), held.dtype))
    check = storage.get_pergroup_param(16, 8)["weight_offset"].check
    assert check is not None
    assert check(held) is None
    offsets[3, 1] = -2
    assert "1 of 16 values are not zero: the type is symmetric, for example -2" in str(check(pack(offsets, packing, 4)))


@pytest.mark.parametrize(
    ("weight", "inputs", "said"),
    [
        (
            WeightForm(num_bits=4, packing=EIGHTS),
            100,
            "100 input features do not fill elements of 8 values, as weight is packed: 96 or 104 would fit, or any "
            "multiple of 8",
        ),
        (
            WeightForm(packing=Packing(1, values=4, signed=False)),
            3,
            "3 input features do not fill elements of 4 values, as weight is packed: 4 would fit, or any multiple of 4",
        ),
        (
            WeightForm(strategy="group", group_size=48),
            128,
            "128 input features cannot be cut into 3 equal groups; groups of 32 or 64 input features would fit",
        ),
        (
            WeightForm(strategy="group", group_size=48),
            64,
            "64 input features cannot be cut into 2 equal groups; groups of 32 or 64 input features would fit",
        ),
        (
            WeightForm(num_bits=4, strategy="group", group_size=4, offset_packing=Packing(1, values=8)),
            16,
            "4 groups do not fill elements of 8 values, as weight_offset is packed: 8 would fit, or any multiple of 8",
        ),
    ],
)
def test_input_features_that_do_not_fit(weight: WeightForm, inputs: int, said: str) -> None:
    assert IntegerStorage(StoredForm(), weight).reasons_against(inputs) == [said]


def test_output_features_that_do_not_fit() -> None:
    storage = IntegerStorage(StoredForm(), WeightForm(num_bits=4, packing=EIGHTS, offset_packing=ALONG_OUT))
    assert storage.reasons_against_outputs(64) == []
    assert storage.reasons_against_outputs(60) == [
        "60 output features do not fill elements of 8 values, as weight_offset is packed: 56 or 64 would fit, or any "
        "multiple of 8"
    ]
    pairs = IntegerStorage(StoredForm(), WeightForm(num_bits=4, packing=Packing(0)))
    assert "3 output features do not fill elements of 2 values, as weight is packed" in str(
        pairs.reasons_against_outputs(3)
    )


INDEXED = WeightForm(num_bits=4, strategy="group", group_size=4, indexed=True, symmetric=False)


def test_the_index_of_groups_is_checked() -> None:
    check = IntegerStorage(StoredForm(), INDEXED).get_pergroup_param(12, 8)["weight_g_idx"].check
    assert check is not None
    assert check(torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 0, 1, 1], dtype=torch.int32)) is None
    assert check(torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 1, 2, 2, 3], dtype=torch.int32)) == (
        "1 of 12 values are not groups from 0 to 2: 3"
    )
    assert check(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], dtype=torch.int32)) == (
        "group 0 has 3 input features, and not 4 as all groups have"
    )
    assert not IntegerStorage(StoredForm(), replace(INDEXED, strategy="channel")).keeps()


def test_each_input_feature_has_the_scale_of_its_group() -> None:
    storage, index = IntegerStorage(StoredForm(), INDEXED), torch.randperm(12, dtype=torch.int32) // 4
    stored = {
        "weight": torch.randint(-8, 8, (8, 12), dtype=torch.int8),
        "weight_scale": torch.rand(8, 3),
        "weight_offset": torch.randint(-4, 4, (8, 3)).to(torch.float32),
        "weight_g_idx": index,
    }
    order = storage.order(stored)
    assert order is not None
    assert index[order].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    found = storage.dequantize(stored)
    for feature, group in enumerate(index.tolist()):
        codes = stored["weight"][:, feature].to(torch.float64)
        exact = (codes - stored["weight_offset"][:, group]) * stored["weight_scale"][:, group].to(torch.float64)
        torch.testing.assert_close(found[:, feature].to(torch.float64), exact)
    plain = storage.quantize(torch.randn(8, 12))
    assert plain["weight_g_idx"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(("num_bits", "count"), [(4, 8), (8, 4)])
def test_a_single_column_is_packed_along_the_output_features(num_bits: int, count: int) -> None:
    """Zero points of channels: an axis of size 1 has any stride."""
    offsets = torch.arange(-8, 8, dtype=torch.int8)[:, None]
    packing = Packing(0, values=count, signed=False)
    packed = pack(offsets, packing, num_bits)
    assert packed.shape == (16 // count, 1)
    assert torch.equal(unpack(packed, packing, num_bits), offsets)
    assert torch.equal(packed, offset_binary(offsets, num_bits, axis=0))
