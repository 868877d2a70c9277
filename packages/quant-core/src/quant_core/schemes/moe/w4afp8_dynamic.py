"""W4AFP8_DYNAMIC experts: int4 weights per channel or group, activations quantised to FP8 per token."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w4afp8_dynamic import AscendW4AFP8DynamicLinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4AFP8_DYNAMIC", "moe")
class AscendW4AFP8DynamicMoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("per channel", "per group")
    linear = AscendW4AFP8DynamicLinearMethod
