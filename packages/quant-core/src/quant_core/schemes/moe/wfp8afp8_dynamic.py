"""WFP8AFP8_DYNAMIC experts: FP8 weights with one scale per channel or tensor, activations quantised per token."""

import torch
from torch import Tensor, nn

from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.linear.wfp8afp8_dynamic import AscendW8A8FP8DynamicLinearMethod
from quant_core.schemes.mx import MX_DEVICES
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows


@register_scheme("WFP8AFP8_DYNAMIC", "moe")
@register_scheme("W8A8FP8_DYNAMIC", "moe")
class AscendW8A8FP8DynamicMoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank:
        w13_weight, w2_weight: float8_e4m3fn [E, in, out], views of what is stored; on CPU bfloat16
        w13_weight_scale, w2_weight_scale: float32 [E, out]
    """

    granularity = ("per channel", "per tensor")
    checked_against = {"WFP8AFP8_DYNAMIC": ("llmcompressor/qwen3-moe/FP8_DYNAMIC",)}
    supported_devices = MX_DEVICES
    linear = AscendW8A8FP8DynamicLinearMethod

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """One scale for each row."""
        linear = self.halves[half]
        assert isinstance(linear, AscendW8A8FP8DynamicLinearMethod)
        return linear.quantize_tokens(x)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        return grouped(layer, half, rows, scale="weight_scale", output_dtype=dtype)
