"""W4A4_MXFP4 experts: FP4 weights and activations in blocks of 32 that share a power of two."""

from quant_core.schemes.linear.w4a4_mxfp4 import AscendW4A4MXFP4LinearMethod
from quant_core.schemes.moe.w8a8_mxfp8 import AscendW8A8MXFP8MoEMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A4_MXFP4", "moe")
class AscendW4A4MXFP4MoEMethod(AscendW8A8MXFP8MoEMethod):
    """As W8A8_MXFP8, with FP4 on both sides."""

    checked_against = {"W4A4_MXFP4": ("qwen3-moe/W4A4_MXFP4",)}
    linear = AscendW4A4MXFP4LinearMethod
