"""W4A8_MXFP experts: FP4 weights and FP8 activations in blocks of 32 that share a power of two."""

from quant_core.schemes.linear.w4a8_mxfp import AscendW4A8MXFPLinearMethod
from quant_core.schemes.moe.w8a8_mxfp8 import AscendW8A8MXFP8MoEMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A8_MXFP", "moe")
class AscendW4A8MXFPMoEMethod(AscendW8A8MXFP8MoEMethod):
    """As W8A8_MXFP8; of these operands the operator takes the weight's exponents as antiquant_scale."""

    checked_against = {"W4A8_MXFP": ("qwen3-moe/W4A8_MXFP",)}
    linear = AscendW4A8MXFPLinearMethod
    weight_scale = "antiquant_scale"
