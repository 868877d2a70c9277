"""W8A8 experts: int8 weights, activations quantised with a scale and zero point of each expert, from calibration."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.params import tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows
from quant_core.schemes.static_inputs import of_each_row, one_input_scale


@register_scheme("W8A8", "moe")
@register_scheme("W8A8S", "moe")
class AscendW8A8MoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank:
        w13_weight, w2_weight: int8 [E, in, out]
        w13_input_scale, w2_input_scale: float32 [E]
        w13_deq_scale, w2_deq_scale: float32 [E, out], encoded int64 for float16 results
    and, as in a linear layer of this type, not where the input is symmetric:
        w13_input_offset, w2_input_offset: float32 [E]
        w13_quant_bias, w2_quant_bias: int32 [E, out]
    """

    granularity = ("per channel", "per tensor")
    linear = AscendW8A8LinearMethod
    before_routing = False

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """As the linear scheme does.

        Raises:
            LimitError: if gate and up have input scales of their own, though their input is the same.

        """
        linear.process_weights_after_loading(module)
        one_input_scale(linear, module, "input_scale", "input_offset")

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """Rows with the scale and zero point of their expert; what lies behind the last expert's takes that one's."""
        assert counts is not None
        scale, offset = tensor_of(layer, f"{half}input_scale"), getattr(layer, f"{half}input_offset", None)
        zero_point = None if offset is None else of_each_row(offset, counts, len(x))
        scale = of_each_row(scale, counts, len(x))
        return torch.ops.npu.npu_quantize(x, scale, zero_point, torch.qint8, 0, True), None

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        bias = "quant_bias" if hasattr(layer, f"{half}quant_bias") else None
        return grouped(layer, half, rows, scale="deq_scale", bias=bias, output_dtype=dtype)
