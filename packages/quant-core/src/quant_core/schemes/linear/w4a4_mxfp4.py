"""W4A4_MXFP4: FP4 weights and activations in blocks of 32 that share a power of two.

W4A4_MXFP4_SVD stores the same; its low-rank part is an addition.
"""

from quant_core.schemes.mx import MXFP4, TO_FP4, TOKENS_MXFP4, MXLinearScheme
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A4_MXFP4", "linear")
@register_scheme("W4A4_MXFP4_SVD", "linear")
class AscendW4A4MXFP4LinearMethod(MXLinearScheme):
    """Activations: exponent floor(log2(max)) - 2 per block, elements to the nearest E2M1, up to 6.

    Ties go away from zero, unless a format states that they go to even.

    Run time, both as views of contiguous tensors [out, ...]:
        weight: uint8 [in / 2, out]; on CPU: int8 [in, out] with twice the values, one byte each
        weight_scale: uint8 [ceil(in / 64), out, 2]
    """

    granularity = ("blocks of 32",)
    checked_against = {
        "W4A4_MXFP4": ("qwen3/W4A4_MXFP4", "llmcompressor/qwen3/MXFP4"),
        "W4A4_MXFP4_SVD": ("qwen3/W4A4_MXFP4_SVD",),
    }
    stores = MXFP4
    activation = TOKENS_MXFP4
    quantisation = TO_FP4
