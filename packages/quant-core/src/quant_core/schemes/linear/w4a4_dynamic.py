"""W4A4_DYNAMIC: int4 weights per output channel or per group, activations quantised to int4 per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import packed_at_run_time, process_int4_weight
from quant_core.schemes.tokens import token_scale
from quant_core.stored import ActivationForm, WeightForm

_PACKED = ("910B", "910C")


@register_scheme("W4A4_DYNAMIC", "linear")
class AscendW4A4DynamicLinearMethod(AscendW8A8DynamicLinearMethod):
    """y = (a (q - weight_offset)ᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 7.

    x_scale is of each token.

    Run time, with g groups of input features (1: per channel or tensor):
        weight: int32 [in, out / 8], half a byte per value; int8 [in, out] on CPU, for several groups or asymmetric
            weights (whose int32 sums the operator gives for int8 alone), or where in or out are no multiples of 8
        weight_scale, weight_offset: as W8A8_DYNAMIC
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {"W4A4_DYNAMIC": ("qwen3/W4A4_DYNAMIC", "qwen3/W4A4_DYNAMIC_LAOS_ONLINE")}
    stores = WeightForm(num_bits=4)
    activation = ActivationForm(num_bits=4)
    _packed: bool

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        whole = codes.shape[1] % 8 == 0 and self.storage.weight.strategy != "group" and not self.corrects
        self._packed = whole and packed_at_run_time(self.context, _PACKED)
        process_int4_weight(layer, codes, self._packed)

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input [tokens, in], packed where the weight is, and their scales [tokens]."""
        partition = self.context.partition
        if self._packed and partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=torch.quint4x2)
            return codes, scale
        scale = token_scale(rows, 7, partition)
        if self._packed:
            return torch.ops.npu.npu_quantize(rows, scale.reciprocal(), None, torch.quint4x2, -2, False), scale
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale
