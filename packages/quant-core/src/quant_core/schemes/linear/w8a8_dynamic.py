"""W8A8_DYNAMIC: int8 weights with one scale per output channel, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight, sum_of_groups
from quant_core.schemes.tokens import token_scale
from quant_core.storage import IntegerStorage, tensors_of
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("W8A8_DYNAMIC", "linear")
@register_scheme("W8A8_SVD_DYNAMIC", "linear")
class AscendW8A8DynamicLinearMethod(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 127 per token.

    Run time, with g groups of input features (1: per channel):
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
    stores = WeightForm()
    activation = ActivationForm()
    strategies = ("channel", "group")
    storage: IntegerStorage

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose weight and scale, drop the offset, which is zero."""
        stored = tensors_of(layer)
        scale = self.storage.scale(stored)
        self._process_weight(layer, self.storage.codes(stored))
        replace_parameter(layer, "weight_scale", scale.flatten() if scale.shape[1] == 1 else scale.t().contiguous())
        drop(layer, "weight_offset", "weight_channel_scale", "weight_channel_offset")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply; per group one multiplication for each."""
        codes, x_scale = self.quantize_tokens(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        if scale.dim() == 1:
            y: Tensor = torch.ops.npu.npu_quant_matmul(
                codes, weight, scale, pertoken_scale=x_scale, bias=bias, output_dtype=x.dtype
            )
        else:
            y = sum_of_groups(codes, weight, scale) * x_scale[:, None]
            y = (y if bias is None else y + bias).to(x.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int8_weight(layer, codes)

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input [tokens, in] and their scales [tokens]."""
        partition = self.context.partition
        if partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows)
            return codes, scale
        scale = token_scale(rows, 127, partition)
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale
