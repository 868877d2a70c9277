"""W8A16_MXFP8: FP8 weights in blocks of 32 that share a power of two, activations in the model's dtype."""

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.mx import MXFP8
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A16_MXFP8", "linear")
class AscendW8A16MXFP8LinearMethod(DequantisedLinearScheme):
    """y = x (q · 2^(weight_scale - 127))ᵀ + bias.

    Run time:
        weight: model dtype [out, in], exact in bfloat16 and float32
    """

    granularity = ("blocks of 32",)
    stores = MXFP8
    strategies = ("group",)
