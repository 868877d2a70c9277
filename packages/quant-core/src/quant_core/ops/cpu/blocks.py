"""Products with a weight of which float32 values are made block by block."""

from collections.abc import Callable

import torch
from torch import Tensor

# float32 values of the weight that are made at a time: enough for a fast product, and they stay in the cache.
_BLOCK = 2**20

# So few rows are multiplied faster the other way round.
_FEW_ROWS = 128


def product(rows: Tensor, n: int, weight: Callable[[slice], Tensor]) -> Tensor:
    """Float32 rows [m, k] times the n rows of a weight.

    Args:
        rows: float32 [m, k].
        n: output features.
        weight: makes some of the weight's rows [r, k] in float32, which are used before the next call.

    Returns:
        float32 [m, n].

    """
    m, k = rows.shape
    y = torch.empty(m, n, dtype=torch.float32)
    width = max(64, _BLOCK // max(1, k) // 64 * 64)
    for start in range(0, n, width):
        part = slice(start, min(n, start + width))
        block = weight(part)
        y[:, part] = (block @ rows.t()).t() if m <= _FEW_ROWS else rows @ block.t()
    return y
