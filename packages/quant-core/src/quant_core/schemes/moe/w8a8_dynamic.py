"""W8A8_DYNAMIC experts: int8 weights with one scale per output channel, activations quantised per token at run time."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows


@register_scheme("W8A8_DYNAMIC", "moe")
class AscendW8A8DynamicMoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank, with g groups of input features (1: per channel):
        w13_weight: int8 [E, hidden, 2 · intermediate]
        w2_weight: int8 [E, intermediate, hidden]
        w13_weight_scale, w2_weight_scale: float32 [E, out], or [E, g, out], which the CPU's operator alone takes
    """

    granularity: ClassVar[tuple[str, ...]] = ("per channel",)
    checked_against: ClassVar[dict[str, tuple[str, ...]]] = {
        "W8A8_DYNAMIC": ("qwen3-moe/W8A8_DYNAMIC", "deepseek-v3/W8A8")
    }
    linear = AscendW8A8DynamicLinearMethod

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """One scale for each row."""
        linear = self.halves[half]
        assert isinstance(linear, AscendW8A8DynamicLinearMethod)
        return linear.quantize_tokens(x)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        return grouped(layer, half, rows, scale="weight_scale", output_dtype=dtype)
