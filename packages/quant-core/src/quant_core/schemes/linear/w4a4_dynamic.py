"""W4A4_DYNAMIC: int4 weights per output channel or per group, activations quantised to int4 per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.groups import groups_of
from quant_core.schemes.int4 import int4_weight, packed_at_run_time, process_int4_weight
from quant_core.schemes.int8 import symmetric
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import Param
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.tokens import token_scale

_PACKED = ("910B", "910C")


@register_scheme("W4A4_DYNAMIC", "linear")
class AscendW4A4DynamicLinearMethod(AscendW8A8DynamicLinearMethod):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 7 per token.

    Stored, with g groups of input features (1: per channel):
        weight: int8 [out, in], values from -8 to 7
        weight_scale: float [out, g]
        weight_offset: float [out, g], zero

    Run time:
        weight: int32 [in, out / 8], half a byte per value; int8 [in, out] on CPU, for several groups (whose int32 sums
            the operator gives for int8 alone), or where in or out are no multiples of 8
        weight_scale: float32 [out], or [g, out]
    """

    granularity = ("per channel", "per group")
    checked_against = {"W4A4_DYNAMIC": ("qwen3/W4A4_DYNAMIC", "qwen3/W4A4_DYNAMIC_LAOS_ONLINE")}
    _packed: bool

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int4_weight(input_size, output_size, axis=None)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel or group becomes 7."""
        return symmetric(weight, groups_of(self.context), 7)

    def _process_weight(self, layer: nn.Module) -> None:
        codes = layer.get_parameter("weight").data
        whole = codes.shape[1] % 8 == 0 and layer.get_parameter("weight_scale").shape[1] == 1
        self._packed = whole and packed_at_run_time(self.context, _PACKED)
        process_int4_weight(layer, codes, self._packed)

    def _quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        partition = self.context.partition
        if self._packed and partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=torch.quint4x2)
            return codes, scale
        scale = token_scale(rows, 7, partition)
        if self._packed:
            return torch.ops.npu.npu_quantize(rows, scale.reciprocal(), None, torch.quint4x2, -2, False), scale
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale
