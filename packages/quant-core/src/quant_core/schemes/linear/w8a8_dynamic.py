"""W8A8_DYNAMIC: int8 weights with one scale per output channel, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.groups import groups_of, scale_params, unequal_groups
from quant_core.schemes.int8 import int8_weight, symmetric, transpose_weight
from quant_core.schemes.params import Param, float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.tokens import token_scale


@register_scheme("W8A8_DYNAMIC", "linear")
@register_scheme("W8A8_SVD_DYNAMIC", "linear")
class AscendW8A8DynamicLinearMethod(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 127 per token.

    Stored, with g groups of input features (1: per channel):
        weight: int8 [out, in]
        weight_scale: float [out, g]
        weight_offset: float [out, g], zero

    Run time:
        weight: int8 [in, out]
        weight_scale: float32 [out], or [g, out]
    """

    granularity = ("per channel", "per group")
    checked_against = {
        "W8A8_DYNAMIC": (
            "qwen3/W8A8_DYNAMIC_SHARDED",
            "qwen2/W8A8_DYNAMIC",
            "qwen3/W4A4_DYNAMIC_LAOS_ONLINE",
            "qwen3/MIXED_LAYERS",
        ),
    }

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Whole groups only."""
        return super().can_serve(context) + unequal_groups(context)

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int8_weight(input_size, output_size)

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight_scale` and `weight_offset`; one group is per channel."""
        return scale_params(self.context.form, input_size, output_size, groups_of(self.context))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose weight and scale, drop the offset, which is zero."""
        self._process_weight(layer)
        scale = float_values(layer.get_parameter("weight_scale").data)
        replace_parameter(layer, "weight_scale", scale.flatten() if scale.shape[1] == 1 else scale.t().contiguous())
        if hasattr(layer, "weight_offset"):
            del layer.weight_offset

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply; per group one multiplication for each."""
        codes, x_scale = self._quantise(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        if scale.dim() == 1:
            y: Tensor = torch.ops.npu.npu_quant_matmul(
                codes, weight, scale, pertoken_scale=x_scale, bias=bias, output_dtype=x.dtype
            )
        else:
            y = self._sum_of_groups(codes, weight, scale) * x_scale[:, None]
            y = (y if bias is None else y + bias).to(x.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _sum_of_groups(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """No operator multiplies int8 by int8 in groups, so the int32 sums of each are scaled here, in float32."""
        length = weight.shape[0] // scale.shape[0]
        total = torch.zeros(codes.shape[0], weight.shape[1], dtype=torch.float32, device=codes.device)
        for group in range(scale.shape[0]):
            part = slice(group * length, (group + 1) * length)
            sums = torch.ops.npu.npu_quant_matmul(
                codes[:, part].contiguous(), weight[part], scale[group], output_dtype=torch.int32
            )
            total += sums * scale[group]
        return total

    def _process_weight(self, layer: nn.Module) -> None:
        transpose_weight(layer)

    def _quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        partition = self.context.partition
        if partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows)
            return codes, scale
        scale = token_scale(rows, 127, partition)
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Weight times scale, group by group."""
        weight, scale = layer.get_parameter("weight"), float_values(layer.get_parameter("weight_scale"))
        return weight.to(torch.float32) * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel or group becomes 127."""
        return symmetric(weight, groups_of(self.context))
