"""WFP8AFP8_BLOCK_DYNAMIC experts: FP8 weights in blocks, activations quantised per token or per group of it."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.wfp8afp8_block_dynamic import AscendWFP8AFP8BlockDynamicLinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("WFP8AFP8_BLOCK_DYNAMIC", "moe")
class AscendWFP8AFP8BlockDynamicMoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("blocks",)
    linear = AscendWFP8AFP8BlockDynamicLinearMethod
