"""W4A4_DYNAMIC experts: int4 weights, activations quantised to int4 per token at run time."""

from torch import Tensor, nn

from quant_core.schemes.linear.w4a4_dynamic import AscendW4A4DynamicLinearMethod
from quant_core.schemes.moe.w8a8_dynamic import AscendW8A8DynamicMoEMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import process_int4_weight


class _Unpacked(AscendW4A4DynamicLinearMethod):
    """One value per byte: no documented operator multiplies int4 by int4 for several experts, and int8 holds both."""

    _packed = False

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int4_weight(layer, codes, packed=False)


@register_scheme("W4A4_DYNAMIC", "moe")
class AscendW4A4DynamicMoEMethod(AscendW8A8DynamicMoEMethod):
    """Each product as in a linear layer of this type.

    Run time: as W8A8_DYNAMIC, on all devices.
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {}
    linear = _Unpacked
    fuses = False  # the fused operator quantises to int8
