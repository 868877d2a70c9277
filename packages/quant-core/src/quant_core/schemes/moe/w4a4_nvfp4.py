"""W4A4_NVFP4 experts: FP4 weights and activations in groups of 16, below stored scales of each expert."""

from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.dequantised_experts import DequantisedMoEScheme
from quant_core.schemes.linear.w4a4_nvfp4 import INPUT_SCALE, AscendW4A4NVFP4LinearMethod
from quant_core.schemes.params import tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes
from quant_core.schemes.static_inputs import of_each_row, one_input_scale


@register_scheme("W4A4_NVFP4", "moe")
class AscendW4A4NVFP4MoEMethod(DequantisedMoEScheme):
    """Each product as in a linear layer of this type, with a weight that was dequantised once.

    Run time, beside the weights, of E experts on this rank:
        w13_input_global_scale, w2_input_global_scale: float32 [E]
    """

    granularity = ("groups of 16",)
    linear = AscendW4A4NVFP4LinearMethod
    before_routing = False

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """As the linear scheme does; gate and up must have one input scale."""
        super().process_one(linear, module)
        one_input_scale(linear, module, INPUT_SCALE)

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """Rows with the scale of their expert."""
        linear = self.halves[half]
        assert counts is not None
        assert isinstance(linear, DequantisedLinearScheme)
        return linear.round_rows(x, of_each_row(tensor_of(layer, f"{half}{INPUT_SCALE}"), counts, len(x)))
