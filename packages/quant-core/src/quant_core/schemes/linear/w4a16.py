"""W4A16: int4 weights, multiplied with activations in the model's dtype."""

from torch import Tensor, nn

from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import packed_at_run_time, process_int4_weight
from quant_core.stored import WeightForm

# The 310P multiplies int8 weights only.
_PACKED = ("910B", "910C", "950")


@register_scheme("W4A16", "linear")
class AscendW4A16LinearMethod(AscendW8A16LinearMethod):
    """y = x ((q - weight_offset) · weight_scale)ᵀ + bias.

    Run time:
        weight: int32 [in, out / 8], half a byte per value; int8 [in, out] on CPU, or where out is no multiple of 8
        weight_scale, weight_offset, weight_g_idx: as W8A16
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {"W4A16": ("qwen3/V0_W4A16",)}
    stores = WeightForm(num_bits=4, symmetric=False)

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int4_weight(layer, codes, packed_at_run_time(self.context, _PACKED))
