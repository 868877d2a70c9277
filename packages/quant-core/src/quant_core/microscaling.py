"""The small numbers of microscaling (MX): E2M1 elements and E8M0 exponents.

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 as codes 0 to 7 and its sign in bit 3; two codes share a byte,
the first in the lower half. E8M0 is the exponent of a power of two: byte e stands for 2^(e - 127), 255 for NaN. A
block of 32 elements shares one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.packing import pack_pairs, unpack_pairs

#: Elements that share an exponent.
BLOCK = 32

E2M1_MAX = 6.0
E4M3_MAX = 448.0

#: floor(log2) of the largest finite element.
EMAX = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15, torch.float4_e2m1fn_x2: 2}

E8M0_ONE = 127
E8M0_NAN = 255

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Half-way between two neighbours, and whether a tie goes up when it goes to the even code.
_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def nearest_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 values of float32 ones, ties to even; what lies beyond 448 saturates, NaN stays.

    By arithmetic, because not every NPU can cast to FP8.
    """
    return _nearest(values, 3, -6, E4M3_MAX)


def nearest_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 values of float32 ones, ties to even; what lies beyond 6 saturates, NaN stays."""
    return _nearest(values, 1, 0, E2M1_MAX)


def _nearest(values: Tensor, mantissa: int, lowest: int, largest: float) -> Tensor:
    """Values with so many bits of mantissa, whose smallest normal one is 2^lowest."""
    biased = ((_bits(values) >> 23) & 255).clamp_(min=lowest + 127)
    steps = ((biased - mantissa) << 23).view(torch.float32)
    return ((values / steps).round_() * steps).clamp_(-largest, largest)


def e2m1_codes(values: Tensor, ties_away: bool = False) -> Tensor:
    """The nearest E2M1 codes.

    Args:
        values: floating, of any shape; what lies beyond 6 saturates, NaN becomes 0.
        ties_away: ties go to the larger magnitude, otherwise to the even code.

    Returns:
        uint8 codes 0 to 15 in the same shape.

    """
    magnitudes = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for tie, up in _TIES:
        codes += magnitudes >= tie if up or ties_away else magnitudes > tie
    return codes | (values < 0).to(torch.uint8) << 3


def e2m1_values(codes: Tensor) -> Tensor:
    """What uint8 codes 0 to 15 stand for, as float32 in the same shape."""
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Codes [..., k] as bytes [..., k / 2]; raises ValueError for an odd k."""
    return pack_pairs(codes, -1).view(torch.uint8)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Bytes [..., k / 2], uint8 or int8, as uint8 codes [..., k]."""
    return unpack_pairs(packed.view(torch.int8), -1).view(torch.uint8) & 15


def e8m0_values(exponents: Tensor) -> Tensor:
    """2^(e - 127) of uint8 exponents as float32, NaN of 255."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)


def floor_exponents(peaks: Tensor, emax: int) -> Tensor:
    """floor(log2(peak)) - emax as E8M0: the block's largest element gets the largest exponent that elements have.

    Args:
        peaks: float32, not negative; zero and what lies below 2^(emax - 127) give 0, infinity and NaN give NaN.
        emax: see EMAX.

    Returns:
        uint8 in the same shape.

    """
    biased = _bits(peaks) >> 23
    return torch.where(biased == 255, E8M0_NAN, (biased - emax).clamp_(min=0)).to(torch.uint8)


def ceil_exponents(scales: Tensor) -> Tensor:
    """log2(scale) rounded up as E8M0, so that nothing saturates; below 2^-126, where E8M0 has one step, to nearest.

    Args:
        scales: float32, not negative; infinity and NaN give NaN.

    Returns:
        uint8 in the same shape.

    """
    bits = _bits(scales)
    biased, fraction = bits >> 23, bits & 0x7FFFFF
    up = torch.where(biased == 0, fraction > 0x400000, fraction > 0)
    return torch.where(biased == 255, E8M0_NAN, biased + up).to(torch.uint8)


def blocks_of(k: int) -> int:
    """How many blocks k elements form, the last of which may be short."""
    return -(-k // BLOCK)


def in_blocks(values: Tensor) -> Tensor:
    """[..., k] as [..., blocks, 32]; a short last block is filled up with zeros."""
    short = -values.shape[-1] % BLOCK
    if short:
        values = torch.nn.functional.pad(values, (0, short))
    blocks: Tensor = values.unflatten(-1, (values.shape[-1] // BLOCK, BLOCK))
    return blocks


def scale_blocks_(values: Tensor, scales: Tensor) -> Tensor:
    """Multiply float32 values [..., k] by one factor per block [..., blocks or more], in place."""
    return combine_blocks_(Tensor.mul_, values, scales, BLOCK)


def combine_blocks_(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, others: Tensor, length: int) -> Tensor:
    """Combine each block of values [..., k] with one of its own [..., blocks or more], in place.

    Args:
        combine: Tensor.mul_, Tensor.add_ or alike.
        values: contiguous.
        others: one for each block.
        length: of a block; the last one may be short.

    """
    whole = values.shape[-1] // length
    head, tail = values[..., : whole * length], values[..., whole * length :]
    if whole:
        combine(head.unflatten(-1, (whole, length)), others[..., :whole, None])
    if tail.shape[-1]:
        combine(tail, others[..., whole : whole + 1])
    return values


def pair_exponents(exponents: Tensor) -> Tensor:
    """[..., blocks] as the operators take them: [..., ceil(blocks / 2), 2], an odd number filled up with a 0."""
    if exponents.shape[-1] % 2:
        exponents = torch.nn.functional.pad(exponents, (0, 1))
    pairs: Tensor = exponents.unflatten(-1, (exponents.shape[-1] // 2, 2))
    return pairs


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous().view(torch.int32)
