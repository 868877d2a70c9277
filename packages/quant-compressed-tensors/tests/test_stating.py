"""How a module is stored: in the words of its group, with the containers that the headers tell."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from small_folders import (
    FP8,
    FP8_BLOCK,
    FP8_GROUP_128,
    FP8_STATIC,
    FP8_TOKEN,
    INT4,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    Arguments,
    asymmetric,
    at_run_time,
    group,
    grouped,
    stored,
)
from torch import Tensor

from quant_compressed_tensors.stating import SUFFIXES, is_float_weight, is_quantised, stated
from quant_core import ActivationForm, Packing, StoredForm, StoredTensor, WeightForm


def form(tensors: dict[str, Tensor], module: str = "m") -> StoredForm:
    """A module under canonical suffixes."""
    headers = {}
    for suffix, tensor in tensors.items():
        canonical = SUFFIXES.get(suffix, suffix)
        if canonical is not None:
            name = f"{module}.{suffix}"
            headers[canonical] = StoredTensor(name, tuple(tensor.shape), tensor.dtype, "model.safetensors")
    return StoredForm(module, headers)


def said(
    weights: Arguments, inputs: Arguments | None, form_: StoredForm | None = None, file_format: str = "", **more: Any
) -> StoredForm:
    scheme = QuantizationScheme.model_validate(group(weights, inputs, **more))
    return stated(form(stored(weights, inputs)) if form_ is None else form_, scheme, file_format)


WORDS_4, WORDS_8 = Packing(axis=1, values=8, signed=False), Packing(axis=1, values=4, signed=False)


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        (INT8, INT8_TOKEN, WeightForm(8, "int", "channel", offset_type="int")),
        ({**INT8, "strategy": "tensor"}, INT8_TOKEN, WeightForm(8, "int", "tensor", offset_type="int")),
        (grouped(INT8), INT8_TOKEN, WeightForm(8, "int", "group", 32, offset_type="int")),
        (asymmetric(INT8), INT8_TOKEN, WeightForm(8, "int", "channel", symmetric=False, offset_type="int")),
        (INT8, None, WeightForm(8, "int", "channel", packing=WORDS_8, offset_type="int")),
        (INT4, INT8_TOKEN, WeightForm(4, "int", "channel", offset_type="int")),
        (grouped(INT4, 64), None, WeightForm(4, "int", "group", 64, packing=WORDS_4, offset_type="int")),
        (
            asymmetric(grouped(INT4)),
            None,
            WeightForm(
                4,
                "int",
                "group",
                32,
                symmetric=False,
                packing=WORDS_4,
                offset_type="int",
                offset_packing=Packing(axis=0, values=8, signed=False),
            ),
        ),
        (FP8, FP8_TOKEN, WeightForm(8, "float", "channel", offset_type="int")),
        (FP8_BLOCK, FP8_GROUP_128, WeightForm(8, "float", "block", None, (128, 128), offset_type="int")),
        (MXFP8, None, WeightForm(8, "float", "group", 32, scale_dtype=torch.uint8, offset_type="int")),
        (
            MXFP4,
            None,
            WeightForm(4, "float", "group", 32, packing=Packing(1), scale_dtype=torch.uint8, offset_type="int"),
        ),
        (
            NVFP4,
            None,
            WeightForm(
                4,
                "float",
                "group",
                16,
                packing=Packing(1),
                scale_dtype=torch.float8_e4m3fn,
                outer="tensor",
                offset_type="int",
            ),
        ),
    ],
)
def test_weights(weights: Arguments, inputs: Arguments | None, expected: WeightForm) -> None:
    assert said(weights, inputs).weight == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (None, None),
        (INT8_TOKEN, ActivationForm()),
        (asymmetric(INT8_TOKEN), ActivationForm(symmetric=False)),
        (INT8_STATIC, ActivationForm(dynamic=False, strategy="tensor")),
        (asymmetric(INT8_STATIC), ActivationForm(dynamic=False, strategy="tensor", symmetric=False)),
        ({**INT8_TOKEN, "num_bits": 4}, ActivationForm(4)),
        (FP8_TOKEN, ActivationForm(type="float")),
        (FP8_STATIC, ActivationForm(type="float", dynamic=False, strategy="tensor")),
        (FP8_GROUP_128, ActivationForm(type="float", strategy="group", group_size=128)),
        (at_run_time(MXFP8), ActivationForm(type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)),
        (at_run_time(MXFP4), ActivationForm(4, "float", True, "group", 32, scale_dtype=torch.uint8)),
        (
            at_run_time(NVFP4),
            ActivationForm(4, "float", True, "group", 16, scale_dtype=torch.float8_e4m3fn, outer="tensor"),
        ),
    ],
)
def test_inputs(inputs: Arguments | None, expected: ActivationForm | None) -> None:
    assert said(INT8, inputs).input == expected


@pytest.mark.parametrize("name", ["int-quantized", "pack-quantized", "naive-quantized", None])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inputs", [None, INT8_TOKEN])
def test_containers_are_told_by_headers(name: str | None, packed: bool, inputs: Arguments | None) -> None:
    """And by no name: four bits stand one in a byte or eight in a word, with inputs or without."""
    headers = form(stored(grouped(INT4), inputs, packed=packed))
    found = said(grouped(INT4), inputs, headers, "int-quantized", format=name).weight
    assert found is not None
    assert found.packing == (WORDS_4 if packed else None)


@pytest.mark.parametrize(
    ("own", "of_all", "packed"),
    [
        ("pack-quantized", "int-quantized", True),
        (None, "pack-quantized", True),
        ("int-quantized", "pack-quantized", False),
        ("naive-quantized", "mixed-precision", False),
    ],
)
def test_containers_while_there_are_no_files(own: str | None, of_all: str, packed: bool) -> None:
    """The format tells, the group's before the checkpoint's."""
    found = said(INT8, None, StoredForm("m"), of_all, format=own).weight
    assert found is not None
    assert found.packing == (WORDS_8 if packed else None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_zero_points_in_bytes_beside_packed_weights(dtype: torch.dtype) -> None:
    """As compressed-tensors before 0.9.4 wrote them."""
    tensors = stored(asymmetric(grouped(INT4)), None)
    if dtype == torch.int8:
        tensors["weight_zero_point"] = torch.zeros(tensors["weight_scale"].shape, dtype=dtype)
    found = said(asymmetric(grouped(INT4)), None, form(tensors)).weight
    assert found is not None
    assert found.packing == WORDS_4
    assert found.offset_packing == (Packing(axis=0, values=8, signed=False) if dtype == torch.int32 else None)


def test_an_index_of_groups() -> None:
    tensors = stored(grouped(INT4), None)
    assert not said(grouped(INT4), None, form(tensors)).weight.indexed  # type: ignore[union-attr]
    tensors["weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    assert said(grouped(INT4), None, form(tensors)).weight.indexed  # type: ignore[union-attr]


def test_sizes_are_those_of_the_values() -> None:
    for weights, inputs in [(INT8, INT8_TOKEN), (INT8, None), (grouped(INT4), None), (MXFP4, None), (FP8, FP8_TOKEN)]:
        assert said(weights, inputs, form(stored(weights, inputs, (64, 256)))).sizes() == (256, 64)


# --- what is quantised at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_float_module(dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 4, dtype=dtype)
    assert not is_quantised(form({"weight": weight, "bias": weight[0]}))
    assert not is_quantised(form({"bias": weight[0]}))
    assert not is_quantised(form({"e_score_correction_bias": weight[0], "weight": weight}))
    assert is_float_weight(form({"weight": weight}))


@pytest.mark.parametrize(
    "suffix",
    [
        *("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx"),
        *("input_scale", "input_zero_point", "input_global_scale"),
    ],
)
def test_a_float_weight_with_anything_beside_it_is_not_float(suffix: str) -> None:
    assert is_quantised(form({"weight": torch.zeros(4, 4), suffix: torch.ones(1)}))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("suffix", ["weight", "weight_packed"])
def test_a_weight_of_anything_else_is_quantised(dtype: torch.dtype, suffix: str) -> None:
    found = form({suffix: torch.zeros(4, 4).to(dtype)})
    assert is_quantised(found)
    assert not is_float_weight(found)
