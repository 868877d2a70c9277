"""The operators have torch_npu's own schemas, as its wheel printed them."""

import json
from pathlib import Path

import pytest
import torch
from operator_calls import operator_of

from quant_core import ops
from quant_core.ops.dtypes import dtype_of
from quant_core.ops.schemas import SCHEMAS

REAL = json.loads((Path(__file__).parent / "torch_npu_schemas.json").read_text())["schemas"]


def test_every_operator_of_the_table_is_compared() -> None:
    assert SCHEMAS.keys() == REAL.keys() == ops.CPU_KERNELS.keys()
    assert all(ops.fake_function(name) for name in SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_table_has_the_real_schema(name: str) -> None:
    assert f"npu::{name}{SCHEMAS[name]}" == REAL[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_torch_has_the_real_schema(name: str) -> None:
    assert str(operator_of(name)._schema) == REAL[name]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("key", ["CPU", "Meta"])
def test_an_operator_has_a_kernel_and_a_fake_function(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", key)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.qint8,
        torch.quint8,
        torch.qint32,
        torch.bfloat16,
        torch.quint4x2,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
    ],
)
def test_the_number_of_a_dtype_is_what_torch_makes_of_it(dtype: torch.dtype) -> None:
    """An int argument that is given a dtype receives torch's own number for it."""
    received: list[int] = []
    with torch.library._scoped_library("quant_core_test", "FRAGMENT") as library:
        library.define("number(Tensor x, int dtype) -> ()")
        library.impl("number", lambda x, dtype: received.append(dtype), "CPU")
        torch.ops.quant_core_test.number(torch.zeros(1), dtype)
    (number,) = received
    assert type(number) is int
    assert dtype_of(number) == dtype


def test_cann_s_numbers_and_dtypes_themselves_are_understood() -> None:
    assert dtype_of(291) == torch.float8_e5m2
    assert dtype_of(292) == torch.float8_e4m3fn
    assert dtype_of(torch.int8) == torch.int8
    assert dtype_of(293) == torch.float8_e8m0fnu
    assert dtype_of(296) == torch.float4_e2m1fn_x2
    with pytest.raises(ValueError, match="dtype number 290"):
        dtype_of(290)
