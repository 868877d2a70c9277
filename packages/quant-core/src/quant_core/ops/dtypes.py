"""The numbers by which operators name dtypes.

A dtype argument reaches a kernel as an int: torch's ScalarType below 256, or 256 plus CANN's aclDataType
(operators.md, section 0).
"""

import torch

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
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
}


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
