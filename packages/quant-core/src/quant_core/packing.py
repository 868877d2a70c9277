"""int4 values in wider carriers: two to a byte, as checkpoints store them, eight to an int32, as operators take them.

Nibbles are two's complement and the even value is the low one, so the bytes of a row of pairs are those of a row of
eights (the machine must be little-endian, as all are that have an NPU).
"""

import torch
from torch import Tensor

from quant_core.stored import Packing


def pack_pairs(values: Tensor, axis: int) -> Tensor:
    """Two neighbours along an axis to a byte; of values beyond -8 to 7 the lowest four bits are taken.

    Args:
        values: integers [..., 2 s, ...].
        axis: the axis that shrinks.

    Returns:
        int8 [..., s, ...].

    Raises:
        ValueError: for an odd number of values along the axis.

    """
    if values.shape[axis] % 2:
        raise ValueError(f"{list(values.shape)}: an odd number of values on axis {axis} cannot be packed in pairs")
    axis %= values.dim()
    low, high = values.to(torch.int8).unflatten(axis, (values.shape[axis] // 2, 2)).unbind(axis + 1)
    packed: Tensor = (low & 15) | (high << 4)
    return packed


def unpack_pairs(packed: Tensor, axis: int) -> Tensor:
    """The values -8 to 7 of a packed axis.

    Args:
        packed: int8 [..., s, ...].
        axis: the axis that grows.

    Returns:
        int8 [..., 2 s, ...].

    """
    # An int8 shifted to the right keeps its sign; the low nibble gets one by going through the high one.
    axis %= packed.dim()
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=axis + 1).flatten(axis, axis + 1)


def pack_eights(values: Tensor) -> Tensor:
    """Eight neighbours along the last axis to an int32; of values beyond -8 to 7 the lowest four bits are taken.

    Args:
        values: integers [..., 8 s].

    Returns:
        int32 [..., s].

    Raises:
        ValueError: if the last axis is no multiple of 8.

    """
    if values.shape[-1] % 8:
        raise ValueError(f"{list(values.shape)}: the last axis cannot be packed in eights, as it is no multiple of 8")
    if values.numel() == 0:  # nor can it be viewed in another dtype
        return values.new_empty((*values.shape[:-1], values.shape[-1] // 8), dtype=torch.int32)
    return pack_pairs(values, -1).contiguous().view(torch.int32)


def unpack_eights(packed: Tensor) -> Tensor:
    """The values -8 to 7 of a packed last axis.

    Args:
        packed: int32 [..., s].

    Returns:
        int8 [..., 8 s].

    """
    return unpack_pairs(row_major(packed).view(torch.int8), -1)


def pack(values: Tensor, packing: Packing | None, num_bits: int = 4) -> Tensor:
    """Integers [out, in] as a module stores them; None leaves them as they are.

    Raises:
        ValueError: if an axis is no multiple of the values in one element.

    """
    if packing is None:
        return values
    if packing.container(num_bits) == torch.int8:
        packed = pack_pairs(values, packing.axis)
    elif packing.axis == 1:
        # A copy: an axis of size 1 may have any stride, and a view in a wider dtype wants multiples of its size.
        whole = values.clone(memory_format=torch.contiguous_format)
        packed = pack_eights(whole) if num_bits == 4 else whole.view(torch.int32)
    else:
        packed = pack(values.t(), Packing(1, packing.values), num_bits).t().contiguous()
    return packed if packing.signed else packed ^ _sign_bits(packed.dtype, num_bits)


def unpack(stored: Tensor, packing: Packing | None, num_bits: int = 4) -> Tensor:
    """The values of a stored tensor, int8 [out, in]; None takes them as they are."""
    if packing is None:
        return stored
    packed = stored if packing.signed else stored ^ _sign_bits(stored.dtype, num_bits)
    if packing.container(num_bits) == torch.int8:
        return unpack_pairs(packed, packing.axis)
    if packing.axis == 0:
        return unpack(packed.t(), Packing(1, packing.values), num_bits).t().contiguous()
    return unpack_eights(packed) if num_bits == 4 else row_major(packed).view(torch.int8)


def _sign_bits(container: torch.dtype, num_bits: int) -> int:
    """The sign bits of all values in one element: offset binary has them turned over, v + 8 is v with another one."""
    bits: int = sum(1 << (shift - 1) for shift in range(num_bits, 8 * container.itemsize + 1, num_bits))
    signed: int = bits - 2 ** (8 * container.itemsize)
    return signed


def row_major(values: Tensor) -> Tensor:
    """The same values, contiguous and with stride 1 on the last axis, which a view in a dtype of another size needs.

    `Tensor.contiguous` leaves the stride of an axis of size 1 as it is.
    """
    if values.is_contiguous() and values.stride(-1) == 1:
        return values
    return values.clone(memory_format=torch.contiguous_format)
