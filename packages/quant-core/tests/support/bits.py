"""Packed integers and FP4 by the letter of their definitions, in NumPy; nothing here is the package's.

int4: two's complement in four bits. Pairs: the even value in the lower half of a byte. Eights: value j in bits 4j to
4j + 3 of an int32. E2M1: OCP Microscaling Formats (MX) 1.0, section 5.3.3: sign, two bits of exponent with the bias 1,
one bit of mantissa.
"""

import numpy as np
import torch
from torch import Tensor

#: What each code stands for, 0b0000 to 0b1111.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def fields(packed: Tensor, count: int) -> np.ndarray:
    """The fields of four bits of each element, the lowest first, on an axis of their own behind the others."""
    whole = packed.contiguous().numpy().astype(np.int64)
    return np.stack([whole // 16**place % 16 for place in range(count)], axis=-1)


def joined(values: Tensor, count: int) -> np.ndarray:
    """Neighbours on the last axis as one unsigned number."""
    whole = values.contiguous().numpy().astype(np.int64) % 16
    parts = whole.reshape(*whole.shape[:-1], whole.shape[-1] // count, count)
    return sum(parts[..., place] * 16**place for place in range(count))


def signed(codes: np.ndarray) -> np.ndarray:
    """Two's complement in four bits."""
    return np.where(codes < 8, codes, codes - 16)


def pack_pairs(values: Tensor, axis: int) -> Tensor:
    """Integers [..., 2 s, ...] as int8 [..., s, ...]."""
    packed = joined(values.movedim(axis, -1), 2).astype(np.uint8).view(np.int8)
    return torch.from_numpy(packed).movedim(-1, axis).contiguous()


def unpack_pairs(packed: Tensor, axis: int) -> Tensor:
    """int8 [..., s, ...] as int8 [..., 2 s, ...]."""
    values = torch.from_numpy(signed(fields(packed.movedim(axis, -1), 2)).astype(np.int8))
    return values.flatten(-2).movedim(-1, axis).contiguous()


def pack_eights(values: Tensor) -> Tensor:
    """Integers [..., 8 s] as int32 [..., s]."""
    return torch.from_numpy(joined(values, 8).astype(np.uint32).view(np.int32))


def unpack_eights(packed: Tensor) -> Tensor:
    """int32 [..., s] as int8 [..., 8 s]."""
    return torch.from_numpy(signed(fields(packed, 8)).astype(np.int8)).flatten(-2)


def e2m1(packed: Tensor) -> Tensor:
    """Bytes [..., s] as the float32 values [..., 2 s] of the two codes in each."""
    return torch.from_numpy(np.array(E2M1, dtype=np.float32)[fields(packed, 2)]).flatten(-2)
