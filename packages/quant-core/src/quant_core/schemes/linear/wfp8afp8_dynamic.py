"""WFP8AFP8_DYNAMIC: FP8 weights with one scale per channel or tensor, activations quantised per token at run time.

W8A8FP8_DYNAMIC is vllm-ascend's name for it.
"""

import torch
from torch import Tensor, nn

from quant_core.schemes.fp8 import FP8LinearScheme, fp8_codes, fp8_multiply
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.tokens import token_scale
from quant_core.storage.fp8 import LARGEST
from quant_core.stored import ActivationForm


@register_scheme("WFP8AFP8_DYNAMIC", "linear")
@register_scheme("W8A8FP8_DYNAMIC", "linear")
class AscendW8A8FP8DynamicLinearMethod(FP8LinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = E4M3(x / x_scale), x_scale = max|x| / 448 per token.

    Run time: what all FP8 types have.
    """

    checked_against = {"WFP8AFP8_DYNAMIC": ("qwen3/WFP8AFP8_DYNAMIC", "llmcompressor/qwen3/FP8_DYNAMIC")}
    activation = ActivationForm(type="float")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        codes, x_scale = self.quantize_tokens(x.reshape(-1, x.shape[-1]))
        y = fp8_multiply(layer, codes, x_scale, bias, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input [tokens, in] and their scales [tokens]."""
        partition = self.context.partition
        if partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=torch.float8_e4m3fn)
            return codes, scale
        scale = token_scale(rows, LARGEST, partition)
        return fp8_codes(rows, scale), scale
