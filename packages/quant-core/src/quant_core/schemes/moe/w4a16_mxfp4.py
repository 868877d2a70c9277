"""W4A16_MXFP4 experts: FP4 weights in blocks of 32 that share a power of two, activations in the model's dtype."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w4a16_mxfp4 import AscendW4A16MXFP4LinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A16_MXFP4", "moe")
class AscendW4A16MXFP4MoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("blocks of 32",)
    linear = AscendW4A16MXFP4LinearMethod
