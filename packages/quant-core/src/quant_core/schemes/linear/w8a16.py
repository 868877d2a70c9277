"""W8A16: int8 weights, per output channel or per group, multiplied with activations in the model's dtype."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight
from quant_core.storage import IntegerStorage, tensors_of
from quant_core.stored import WeightForm


@register_scheme("W8A16", "linear")
class AscendW8A16LinearMethod(AscendLinearScheme):
    """y = x ((q - weight_offset) · weight_scale)ᵀ + bias.

    Run time, with g groups of input features (1: per channel):
        weight: int8 [in, out]
        weight_scale: model dtype [g, out]
        weight_offset: model dtype [g, out], negated, since the operator adds it
    """

    granularity = ("per channel", "per group")
    checked_against = {"W8A16": ("qwen3/W8A16_ASYM", "qwen3/W8A16_GROUP64", "qwen3/MIXED_LAYERS")}
    stores = WeightForm(symmetric=False)
    strategies = ("channel", "group")
    storage: IntegerStorage

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose everything; the operator wants scale and offset in the model's dtype."""
        stored, dtype = tensors_of(layer), self.context.params_dtype
        scale, offset = self.storage.scale(stored), self.storage.offset(stored)
        self._process_weight(layer, self.storage.codes(stored))
        drop(layer, "weight_channel_scale", "weight_channel_offset")
        replace_parameter(layer, "weight_scale", scale.t().contiguous().to(dtype))
        if offset is not None:
            replace_parameter(layer, "weight_offset", (-offset).t().contiguous().to(dtype))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """One operator."""
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        groups = scale.shape[0]
        if bias is not None and x.dtype == torch.bfloat16:
            bias = bias.to(torch.float32)  # the operator's rule for bfloat16
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            x.reshape(-1, x.shape[-1]),
            weight,
            scale,
            getattr(layer, "weight_offset", None),
            bias=bias,
            antiquant_group_size=x.shape[-1] // groups if groups > 1 else 0,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int8_weight(layer, codes)
