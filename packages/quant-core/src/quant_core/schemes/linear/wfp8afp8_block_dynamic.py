"""WFP8AFP8_BLOCK_DYNAMIC: FP8 weights in blocks, activations quantised at run time per token, or per group of it."""

from dataclasses import replace

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.registry import register_scheme
from quant_core.stored import ActivationForm, WeightForm

_TOKENS = ActivationForm(type="float")


@register_scheme("WFP8AFP8_BLOCK_DYNAMIC", "linear")
class AscendWFP8AFP8BlockDynamicLinearMethod(DequantisedLinearScheme):
    """y = Σ over blocks of input features of (a · x_scale)(q · weight_scale)ᵀ, + bias.

    a = E4M3(x / x_scale), x_scale = max|x| / 448 of a token, or of each of its groups; the last group may be short.

    Run time:
        weight: model dtype [out, in]
    """

    granularity = ("blocks",)
    checked_against = {"WFP8AFP8_BLOCK_DYNAMIC": ("llmcompressor/qwen3/FP8_BLOCK",)}
    stores = WeightForm(type="float", strategy="block", block_structure=(128, 128))
    activation = ActivationForm(type="float", strategy="group", group_size=128)
    strategies = ("block",)

    @classmethod
    def takes_input(cls, form: ActivationForm) -> bool:
        """Per token, or per group of any length."""
        return form == _TOKENS or (form.group_size is not None and replace(form, group_size=128) == cls.activation)
