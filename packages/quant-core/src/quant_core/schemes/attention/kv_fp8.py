"""KV_FP8: FP8 keys and values with stored scales, of heads or of all."""

import torch

from quant_core.schemes.caches import QuantisedPages
from quant_core.schemes.mx import MX_DEVICES
from quant_core.schemes.registry import register_scheme
from quant_core.stored import WeightForm


@register_scheme("KV_FP8", "attention")
class AscendFP8AttentionMethod(QuantisedPages):
    """K̂ = q · k_scale, q = E4M3(clamp(K / k_scale, -448, 448)) to nearest, ties to even; values likewise."""

    supported_devices = MX_DEVICES  # those that have FP8
    granularity = ("per channel", "per head", "per tensor")
    checked_against = {
        "KV_FP8": (
            "llmcompressor/qwen3/FP8_DYNAMIC_KV_FP8",
            "llmcompressor/qwen3/FP8_DYNAMIC_KV_FP8_HEAD",
            "llmcompressor/qwen3/KV_FP8_CT010",
        )
    }
    stores = WeightForm(type="float", strategy="tensor")
    cache_dtype = torch.float8_e4m3fn
