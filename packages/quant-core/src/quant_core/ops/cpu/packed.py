"""int8 weights in the layout that oneDNN multiplies, rearranged once: for few rows that takes longer than the product.

A packed weight is a tensor [k, n] of torch's layout `_mkldnn`, of which neither values nor parts can be had. It goes
wherever operators take an int8 weight [k, n] or a list of such, except to results that need exact integers: sums come
back in float32, each the nearest to the exact one, which is what scaling makes of an int32 anyway.
"""

import functools

import torch
from torch import Tensor

from quant_core.ops.cpu import int8_gemm

# So many products of int8 values add up to an integer that float32 holds.
_EXACT_INPUTS = 1024


def pack(weight: Tensor) -> Tensor | None:
    """An int8 weight [k, n], packed; None where torch or this processor cannot multiply such weights, or is wrong."""
    return None if refusal() else _pack(weight)


@functools.cache
def refusal() -> str | None:
    """Why packed weights cannot serve here, None if they can."""
    return int8_gemm.refusal(lambda a, b: packed_product(a, _pack(b)))


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.t().contiguous(), None)
    return packed


@functools.cache
def _no_scale() -> tuple[Tensor, Tensor]:
    """A weight's scale and zero point that change nothing."""
    return torch.ones(1, dtype=torch.float32, device="cpu"), torch.zeros(1, dtype=torch.int32, device="cpu")


def packed_product(rows: Tensor, weight: Tensor, integers: bool = False) -> Tensor:
    """int8 rows times a packed weight.

    Args:
        rows: [m, k].
        weight: [k, n], packed.
        integers: whether the sums are wanted themselves.

    Returns:
        [m, n], the exact sums: in float32 each rounded to the nearest, or in int32.

    Raises:
        NotImplementedError: for integers that float32 may not hold.

    """
    if integers and rows.shape[1] > _EXACT_INPUTS:
        raise NotImplementedError(
            f"a packed weight of {rows.shape[1]} input features gives no exact integers; results in int8 and int32 and "
            "a bias in int32 need a plain one"
        )
    if 0 in (*rows.shape, *weight.shape):
        sums = torch.zeros(len(rows), weight.shape[1], dtype=torch.float32, device="cpu")
    else:
        one, zero = _no_scale()
        # Turned into 0 to 255 with the zero point 128, as there is no fast kernel for -128 to 127.
        shifted = (rows ^ -128).view(torch.uint8)
        sums = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, weight, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return sums.to(torch.int32) if integers else sums
