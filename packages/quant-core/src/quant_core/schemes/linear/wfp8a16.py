"""WFP8A16: FP8 weights per tensor, channel or block, multiplied with activations in the model's dtype."""

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.registry import register_scheme
from quant_core.stored import WeightForm


@register_scheme("WFP8A16", "linear")
class AscendWFP8A16LinearMethod(DequantisedLinearScheme):
    """y = x (q · weight_scale)ᵀ + bias.

    Run time:
        weight: model dtype [out, in]
    """

    granularity = ("per tensor", "per channel", "blocks")
    stores = WeightForm(type="float")
    strategies = ("channel", "tensor", "block")
