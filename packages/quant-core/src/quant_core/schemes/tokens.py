"""Scales of activations that are quantised per token at run time."""

import torch
from torch import Tensor

from quant_core.schemes.context import Partition


def token_scale(rows: Tensor, largest: float, partition: Partition) -> Tensor:
    """max|x| / largest of each row, float32 [tokens], as the operators compute it.

    Where each rank of a row-parallel layer holds a slice of every token and all are to use the scale of the whole token
    (exact TP), it is that. The smallest positive scale keeps a zero token from being divided by zero.
    """
    peak = rows.abs().amax(dim=-1).to(torch.float32)
    if partition.max_over_ranks is not None:
        peak = partition.max_over_ranks(peak)
    return (peak / largest).clamp(min=torch.finfo(torch.float32).tiny)


def asymmetric_codes(rows: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of each row, float32 scales and offsets [tokens], so that x is about (codes - offset) · scale.

    Where all ranks are to use the scale of the whole token (exact TP), its extremes go over the ranks in one call.
    """
    if partition.max_over_ranks is None:
        codes, scale, offset = torch.ops.npu.npu_dynamic_quant_asymmetric(rows)
        return codes, scale, offset
    values = rows.to(torch.float32)
    highest, lowest = partition.max_over_ranks(torch.stack([values.amax(dim=-1), -values.amin(dim=-1)]))
    scale = ((highest + lowest) / 255).clamp(min=1e-12)
    offset = 127 - highest / scale
    return torch.ops.npu.npu_quantize(rows, scale, offset, torch.qint8, 0, True), scale, offset
