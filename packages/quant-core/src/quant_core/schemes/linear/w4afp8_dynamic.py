"""W4AFP8_DYNAMIC: int4 weights per channel or group, activations quantised to FP8 per token at run time."""

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.registry import register_scheme
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("W4AFP8_DYNAMIC", "linear")
class AscendW4AFP8DynamicLinearMethod(DequantisedLinearScheme):
    """y = (a ((q - weight_offset) · weight_scale)ᵀ) · x_scale + bias.

    a = E4M3(x / x_scale), x_scale = max|x| / 448 per token.

    Run time:
        weight: model dtype [out, in]
    """

    granularity = ("per channel", "per group")
    stores = WeightForm(num_bits=4)
    activation = ActivationForm(type="float")
    strategies = ("channel", "group")
    takes_offsets = True
