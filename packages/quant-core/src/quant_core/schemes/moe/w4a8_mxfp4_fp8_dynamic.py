"""W4A8_MXFP4_FP8_DYNAMIC experts: FP4 weights in blocks of 32, FP8 activations in groups of 128."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w4a8_mxfp4_fp8_dynamic import AscendW4A8MXFP4FP8DynamicLinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A8_MXFP4_FP8_DYNAMIC", "moe")
class AscendW4A8MXFP4FP8DynamicMoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("blocks of 32",)
    linear = AscendW4A8MXFP4FP8DynamicLinearMethod
