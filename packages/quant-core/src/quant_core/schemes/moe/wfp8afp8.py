"""WFP8AFP8 experts: FP8 weights, activations quantised with a scale of each expert, from calibration."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.fp8 import fp8_codes
from quant_core.schemes.linear.wfp8afp8 import AscendWFP8AFP8LinearMethod
from quant_core.schemes.mx import MX_DEVICES
from quant_core.schemes.params import tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows
from quant_core.schemes.static_inputs import of_each_row, one_input_scale


@register_scheme("WFP8AFP8", "moe")
class AscendWFP8AFP8MoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank:
        w13_weight, w2_weight: float8_e4m3fn [E, in, out], views of what is stored; on CPU bfloat16
        w13_weight_scale, w2_weight_scale: float32 [E, out]
        w13_input_scale, w2_input_scale: float32 [E]
    """

    granularity = ("per channel", "per tensor")
    supported_devices = MX_DEVICES
    linear = AscendWFP8AFP8LinearMethod
    before_routing = False

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """As the linear scheme does; gate and up must have one input scale."""
        linear.process_weights_after_loading(module)
        one_input_scale(linear, module, "input_scale")

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """Rows with the scale of their expert."""
        assert counts is not None
        scale = of_each_row(tensor_of(layer, f"{half}input_scale"), counts, len(x))
        return fp8_codes(x, scale), scale

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        return grouped(layer, half, rows, scale="weight_scale", output_dtype=dtype)
