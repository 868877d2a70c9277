"""C8: int8 keys and values with stored scales, of channels (msModelSlim), or of heads or all (llm-compressor)."""

import torch

from quant_core.schemes.caches import QuantisedPages
from quant_core.schemes.registry import register_scheme
from quant_core.stored import WeightForm


@register_scheme("C8", "attention")
class AscendC8AttentionMethod(QuantisedPages):
    """K̂ = (q - k_offset) · k_scale, q = clamp(rint(K / k_scale + k_offset), -128, 127), and values likewise.

    Keys are quantised as they go into the cache: behind norms and rotary embedding.
    """

    granularity = ("per channel", "per head", "per tensor")
    checked_against = {
        "C8": ("qwen2/V0_W8A8_C8", "qwen3/W8A8C8_ASYM", "qwen3/W8A8_MIX_C8", "llmcompressor/qwen3/W8A8_DYNAMIC_KV_INT8")
    }
    stores = WeightForm(symmetric=False)
    cache_dtype = torch.int8
