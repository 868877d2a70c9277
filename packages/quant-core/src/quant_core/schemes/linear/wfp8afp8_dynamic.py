"""WFP8AFP8_DYNAMIC: FP8 weights with one scale per output channel, activations quantised per token at run time.

W8A8FP8_DYNAMIC is vllm-ascend's name for it.
"""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.mx import MX_DEVICES, run_time_weight
from quant_core.schemes.params import float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop
from quant_core.schemes.tokens import token_scale
from quant_core.storage.fp8 import LARGEST
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("WFP8AFP8_DYNAMIC", "linear")
@register_scheme("W8A8FP8_DYNAMIC", "linear")
class AscendW8A8FP8DynamicLinearMethod(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = E4M3(x / x_scale), x_scale = max|x| / 448 per token.

    Run time:
        weight: float8_e4m3fn [in, out], a view of what is stored; on CPU: bfloat16 [in, out], twice the memory
        weight_scale: float32 [out]
    """

    granularity = ("per channel",)
    checked_against = {"WFP8AFP8_DYNAMIC": ("qwen3/WFP8AFP8_DYNAMIC",)}
    supported_devices = MX_DEVICES

    stores = WeightForm(type="float")
    activation = ActivationForm(type="float")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose the weight, drop the offset, which is zero."""
        replace_parameter(layer, "weight", run_time_weight(layer.get_parameter("weight").data).t())
        replace_parameter(layer, "weight_scale", float_values(layer.get_parameter("weight_scale").data).flatten())
        drop(layer, "weight_offset")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        codes, x_scale = self.quantize_tokens(x.reshape(-1, x.shape[-1]))
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            codes,
            tensor_of(layer, "weight"),
            tensor_of(layer, "weight_scale"),
            pertoken_scale=x_scale,
            bias=None if bias is None else bias.to(torch.float32),
            output_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input [tokens, in] and their scales [tokens]."""
        partition = self.context.partition
        if partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=torch.float8_e4m3fn)
            return codes, scale
        scale = token_scale(rows, LARGEST, partition)
        quotients = rows.to(torch.float32) / scale[:, None]
        return quotients.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
