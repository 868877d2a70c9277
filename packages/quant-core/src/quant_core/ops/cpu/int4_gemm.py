"""The exact product of two int4 matrices whose weight stays packed.

Unpacking a weight in order costs several times what multiplying it with one token does. Here it is never put in order:
the values at even places and those at odd ones are two matrices, and the activations are split to match.
"""

import torch
from torch import Tensor

from quant_core.ops.cpu import int8_gemm
from quant_core.packing import row_major, unpack_eights

# float32 values of half a weight that are made at a time: enough for a fast product, and they stay in the cache.
_BLOCK = 2**20
# Up to so many rows, unpacking costs more than any product saves.
_FEW_ROWS = 16

_EIGHTS = -0x77777778  # 0x88888888 as an int32: turns each nibble -8..7 into 0..15
_EVEN = 0x0F0F0F0F


def takes(x1: Tensor, x2: Tensor) -> bool:
    """Whether `int4_gemm` multiplies these: int32, and one weight for all rows, packed along k."""
    both = x1.dtype == x2.dtype == torch.int32
    return both and x2.dim() == 2 and x1.shape[-1] == x2.shape[0]


def int4_gemm(x1: Tensor, x2: Tensor) -> Tensor:
    """int4 in int32 [..., m, k / 8] times [k / 8, n], a transposed view for speed, as int32 sums [..., m, n]."""
    rows, weight = unpack_eights(x1.flatten(0, -2)), row_major(x2.t())
    if len(rows) > _FEW_ROWS and int8_gemm.choose(len(rows)) is not int8_gemm.float32_blocks:
        sums = int8_gemm.int8_gemm(rows, unpack_eights(weight).t())
    else:
        sums = _float32_halves(rows, weight)
    return sums.view(*x1.shape[:-1], x2.shape[1])


def _float32_halves(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 [m, k] times packed [n, k / 8]. Sums are below 120 k, exact in float32 for any k of a device."""
    (m, k), n = rows.shape, weight.shape[0]
    floats = rows.to(torch.float32)
    even, odd = floats[:, 0::2].t().contiguous(), floats[:, 1::2].t().contiguous()
    surplus = 8 * floats.sum(dim=1)  # of nibbles that are 8 too large
    sums = torch.empty(m, n, dtype=torch.int32)
    width = max(1, min(n, _BLOCK * 2 // max(1, k)))
    halves = torch.empty(width, k // 2, dtype=torch.float32)
    nibbles, ordered = torch.empty_like(weight[:width]), torch.empty_like(weight[:width])
    for start in range(0, n, width):
        block = weight[start : start + width]
        half, both, one = halves[: len(block)], nibbles[: len(block)], ordered[: len(block)]
        torch.bitwise_xor(block, _EIGHTS, out=both)
        half.copy_(torch.bitwise_and(both, _EVEN, out=one).view(torch.int8))
        product = half @ even
        torch.bitwise_right_shift(both, 4, out=both)
        half.copy_(torch.bitwise_and(both, _EVEN, out=one).view(torch.int8))
        product.addmm_(half, odd)
        sums[:, start : start + width] = product.t() - surplus[:, None]
    return sums
