"""W8A16: int8 weights, per output channel or per group, multiplied with activations in the model's dtype."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.groups import groups_of, scale_params, unequal_groups
from quant_core.schemes.int8 import int8_weight, symmetric, transpose_weight
from quant_core.schemes.params import Param, finite, float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A16", "linear")
class AscendW8A16LinearMethod(AscendLinearScheme):
    """y = x ((q - weight_offset) · weight_scale)ᵀ + bias.

    Stored, with g groups of input features (1: per channel):
        weight: int8 [out, in]
        weight_scale: float [out, g]
        weight_offset: float [out, g]

    Run time:
        weight: int8 [in, out]
        weight_scale: model dtype [g, out]
        weight_offset: model dtype [g, out], negated, since the operator adds it
    """

    granularity = ("per channel", "per group")
    checked_against = {"W8A16": ("qwen3/W8A16_ASYM", "qwen3/W8A16_GROUP64", "qwen3/MIXED_LAYERS")}

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Whole groups only."""
        return super().can_serve(context) + unequal_groups(context)

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int8_weight(input_size, output_size)

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight_scale` and `weight_offset`; one group is per channel."""
        groups = groups_of(self.context)
        return scale_params(self.context.form, input_size, output_size, groups, offset=finite)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose everything; the operator wants scale and offset in the model's dtype."""
        self._process_weight(layer)
        dtype = self.context.params_dtype
        scale = float_values(layer.get_parameter("weight_scale").data)
        replace_parameter(layer, "weight_scale", scale.t().contiguous().to(dtype))
        if hasattr(layer, "weight_offset"):
            offset = float_values(layer.get_parameter("weight_offset").data)
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
            antiquant_group_size=weight.shape[0] // groups if groups > 1 else 0,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """(q - offset) · scale, group by group."""
        weight = self._codes(layer).to(torch.float32)
        scale = float_values(layer.get_parameter("weight_scale"))
        length = weight.shape[1] // scale.shape[1]
        if hasattr(layer, "weight_offset"):
            weight = weight - float_values(layer.get_parameter("weight_offset")).repeat_interleave(length, dim=1)
        return weight * scale.repeat_interleave(length, dim=1)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric per channel or group: the largest magnitude becomes 127."""
        return symmetric(weight, groups_of(self.context))

    def _process_weight(self, layer: nn.Module) -> None:
        transpose_weight(layer)

    def _codes(self, layer: nn.Module) -> Tensor:
        """q [out, in] from the stored weight."""
        return layer.get_parameter("weight").data
