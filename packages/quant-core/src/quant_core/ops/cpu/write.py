"""Writing keys and values into pages of 8 bits: by native code, or in calls of torch where that cannot be."""

import torch
from torch import Tensor

from quant_core.ops.cpu import native
from quant_core.ops.cpu.quantize import saturated

_FP8_MAX = 448.0


def codes_of(values: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes of [T, heads, D]: x / scale + offset to nearest, ties to even, saturated.

    NaN becomes the code 0 of int8, and stays one in FP8.
    """
    scaled = values.to(torch.float32) / scale
    if offset is not None:
        scaled += offset
    if dtype == torch.int8:
        return saturated(scaled).to(torch.int8)
    if dtype == torch.float8_e4m3fn:
        return scaled.clamp_(-_FP8_MAX, _FP8_MAX).to(dtype)
    raise NotImplementedError(f"pages of {dtype} are not written; there are int8 and float8_e4m3fn")


def scatter(rows: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Put rows [T, heads, D] at slots of pages [blocks, heads, tokens of a block, D]; slots below 0 are of nobody."""
    if pages.dtype.itemsize == 1:
        rows, pages = rows.view(torch.uint8), pages.view(torch.uint8)
    slots, size = slots.long(), pages.shape[2]
    if len(slots) and int(slots.min()) < 0:
        rows, slots = rows[slots >= 0], slots[slots >= 0]
    pages[slots // size, :, slots % size] = rows


def quantize_to_pages(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    k_scale: Tensor,
    k_offset: Tensor | None,
    v_scale: Tensor,
    v_offset: Tensor | None,
    slots: Tensor,
) -> None:
    """See `quant_core.ops.pages`."""
    operators = native.operators()
    if operators is not None and key_pages.stride(3) == 1 and value_pages.stride(3) == 1:
        operators.quantize_to_pages.default(
            key, value, key_pages, value_pages, k_scale, k_offset, v_scale, v_offset, slots
        )
        return
    scatter(codes_of(key, k_scale, k_offset, key_pages.dtype), key_pages, slots)
    scatter(codes_of(value, v_scale, v_offset, value_pages.dtype), value_pages, slots)
