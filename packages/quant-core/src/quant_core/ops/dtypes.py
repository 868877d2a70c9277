"""The numbers by which operators name dtypes.

A dtype argument reaches a kernel as an int: torch's ScalarType below 256, or 256 plus CANN's aclDataType
(docs/operators.md, section 0).
"""

import torch

#: Numbers for dtypes that torch_npu's own kernels know by CANN's number only.
FLOAT8_E8M0 = 293
FLOAT4_E2M1 = 296

#: torch's own.
FLOAT8_E5M2 = 23
FLOAT8_E4M3 = 24

_BY_NUMBER: dict[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
    FLOAT8_E5M2: torch.float8_e5m2,
    FLOAT8_E4M3: torch.float8_e4m3fn,
    44: torch.float8_e8m0fnu,
    45: torch.float4_e2m1fn_x2,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
    FLOAT8_E8M0: torch.float8_e8m0fnu,
    FLOAT4_E2M1: torch.float4_e2m1fn_x2,
}

_NUMBERS = {dtype: number for number, dtype in _BY_NUMBER.items() if number < 256}


def dtype_of(number: int | torch.dtype) -> torch.dtype:
    """The torch dtype behind an operator's argument.

    Raises:
        ValueError: for a number that our CPU kernels do not know.

    """
    if isinstance(number, torch.dtype):
        return number
    if number not in _BY_NUMBER:
        raise ValueError(f"dtype number {number} is not one that the CPU kernels know: {sorted(_BY_NUMBER)}")
    return _BY_NUMBER[number]


def number_of(dtype: torch.dtype) -> int:
    """The number of a dtype, torch's own."""
    return _NUMBERS[dtype]
