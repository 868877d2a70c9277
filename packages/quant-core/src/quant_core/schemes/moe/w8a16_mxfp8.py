"""W8A16_MXFP8 experts: FP8 weights in blocks of 32 that share a power of two, activations in the model's dtype."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w8a16_mxfp8 import AscendW8A16MXFP8LinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A16_MXFP8", "moe")
class AscendW8A16MXFP8MoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("blocks of 32",)
    linear = AscendW8A16MXFP8LinearMethod
