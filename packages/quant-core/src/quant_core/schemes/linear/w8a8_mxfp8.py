"""W8A8_MXFP8: FP8 weights and activations in blocks of 32 that share a power of two."""

from quant_core.schemes.mx import MXFP8, TO_FP8, TOKENS_MXFP8, MXLinearScheme
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A8_MXFP8", "linear")
class AscendW8A8MXFP8LinearMethod(MXLinearScheme):
    """Activations: exponent floor(log2(max)) - 8 per block, elements to the nearest E4M3, ties to even, up to 448.

    Run time, both as views of contiguous tensors [out, ...]:
        weight: float8_e4m3fn [in, out]; on CPU: bfloat16 [in, out], twice the memory
        weight_scale: uint8 [ceil(in / 64), out, 2]
    """

    granularity = ("blocks of 32",)
    checked_against = {"W8A8_MXFP8": ("qwen3/W8A8_MXFP8", "qwen3/MIXED_LAYERS", "llmcompressor/qwen3/MXFP8")}
    stores = MXFP8
    activation = TOKENS_MXFP8
    quantisation = TO_FP8
