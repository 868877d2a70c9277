"""FP8 activations with a scale per token (docs/operators.md, section 5)."""

import torch
from torch import Tensor

# Rows that are quantised at a time: their float32 values stay in the cache.
_ROWS = 128


def per_token(input: Tensor, smooth_scales: Tensor | None, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """npu_dynamic_quant to FP8: scale = max|x| / the largest finite value, codes = x / scale to the nearest.

    Args:
        input: [..., k], floating.
        smooth_scales: [k], multiplied first.
        target: float8_e4m3fn or float8_e5m2.

    Returns:
        FP8 codes [..., k], and float32 scales [...], zero for a zero row.

    """
    rows, largest = input.flatten(0, -2), torch.finfo(target).max
    codes, scales = torch.empty(rows.shape, dtype=target), torch.empty(rows.shape[0], dtype=torch.float32)
    for start in range(0, rows.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        values = rows[part].to(torch.float32)
        if smooth_scales is not None:
            values = values * smooth_scales.to(torch.float32)
        scales[part] = values.abs().amax(dim=-1).div_(largest)
        # A zero row divides by 0: its NaN become the code 0.
        codes[part] = (values / scales[part, None]).nan_to_num_(0.0).clamp_(-largest, largest).to(target)
    return codes.view(input.shape), scales.view(input.shape[:-1])
