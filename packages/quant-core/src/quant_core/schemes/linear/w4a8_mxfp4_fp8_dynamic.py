"""W4A8_MXFP4_FP8_DYNAMIC: FP4 weights in blocks of 32 that share a power of two, FP8 activations in groups of 128."""

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.mx import MXFP4
from quant_core.schemes.registry import register_scheme
from quant_core.stored import ActivationForm


@register_scheme("W4A8_MXFP4_FP8_DYNAMIC", "linear")
class AscendW4A8MXFP4FP8DynamicLinearMethod(DequantisedLinearScheme):
    """y = Σ over groups of 128 input features of (a · x_scale)(q · 2^(weight_scale - 127))ᵀ, + bias.

    a = E4M3(x / x_scale), x_scale = max|x| / 448 of a token's group: a number, where W4A8_MXFP has a power of two.

    Run time:
        weight: model dtype [out, in], exact in bfloat16 and float32
    """

    granularity = ("blocks of 32",)
    stores = MXFP4
    activation = ActivationForm(type="float", strategy="group", group_size=128)
    strategies = ("group",)
