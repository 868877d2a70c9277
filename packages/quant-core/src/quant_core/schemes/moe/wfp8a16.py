"""WFP8A16 experts: FP8 weights per tensor, channel or block, activations in the model's dtype."""

from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.wfp8a16 import AscendWFP8A16LinearMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("WFP8A16", "moe")
class AscendWFP8A16MoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once."""

    granularity = ("per tensor", "per channel", "blocks")
    linear = AscendWFP8A16LinearMethod
