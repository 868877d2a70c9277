"""W8A16 experts: int8 weights, multiplied with activations in the model's dtype."""

import torch
from torch import Tensor, nn

from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Rows


@register_scheme("W8A16", "moe")
class AscendW8A16MoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank, with g groups of input features (1: per channel or tensor):
        w13_weight, w2_weight: int8 [E, in, out]
        w13_weight_scale, w2_weight_scale: model dtype [E, g, out]
        w13_weight_offset, w2_weight_offset: model dtype [E, g, out], negated, since the operator adds them
    """

    granularity = ("per channel", "per group", "per tensor")
    linear = AscendW8A16LinearMethod

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        offset = "weight_offset" if hasattr(layer, f"{half}weight_offset") else None
        return grouped(layer, half, rows, antiquant_scale="weight_scale", antiquant_offset=offset)
