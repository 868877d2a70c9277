"""W4A16_NVFP4 experts: FP4 weights in groups of 16 with E4M3 scales, activations in the model's dtype."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w4a16_nvfp4 import AscendW4A16NVFP4LinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A16_NVFP4", "moe")
class AscendW4A16NVFP4MoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("groups of 16",)
    linear = AscendW4A16NVFP4LinearMethod
