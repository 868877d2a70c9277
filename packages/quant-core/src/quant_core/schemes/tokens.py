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
