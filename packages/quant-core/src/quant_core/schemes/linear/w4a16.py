"""W4A16: int4 weights, per output channel or per group, multiplied with activations in the model's dtype."""

import torch
from torch import Tensor, nn

from quant_core.packing import pack_pairs
from quant_core.schemes.groups import groups_of
from quant_core.schemes.int4 import int4_codes, int4_weight, packed_along_out, packed_at_run_time, process_int4_weight
from quant_core.schemes.int8 import symmetric
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.params import Param
from quant_core.schemes.registry import register_scheme

# The 310P multiplies int8 weights only.
_PACKED = ("910B", "910C", "950")


@register_scheme("W4A16", "linear")
class AscendW4A16LinearMethod(AscendW8A16LinearMethod):
    """y = x ((q - weight_offset) · weight_scale)ᵀ + bias.

    Stored, with g groups of input features (1: per channel):
        weight: int8; two values to a byte along in [out, in / 2] (per channel) or along out [out / 2, in] (per group),
            or by older writers one [out, in]
        weight_scale: float [out, g]
        weight_offset: float [out, g]

    Run time:
        weight: int32 [in, out / 8], half a byte per value; int8 [in, out] on CPU, or where out is no multiple of 8
        weight_scale: model dtype [g, out]
        weight_offset: model dtype [g, out], negated, since the operator adds it
    """

    granularity = ("per channel", "per group")
    checked_against = {"W4A16": ("qwen3/V0_W4A16",)}

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int4_weight(input_size, output_size, self._axis(input_size))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric per channel or group: the largest magnitude becomes 7."""
        stored, axis = symmetric(weight, groups_of(self.context), 7), self._axis(weight.shape[1])
        return stored if axis is None else {**stored, "weight": pack_pairs(stored["weight"], axis)}

    def _process_weight(self, layer: nn.Module) -> None:
        process_int4_weight(layer, self._codes(layer), packed_at_run_time(self.context, _PACKED))

    def _codes(self, layer: nn.Module) -> Tensor:
        return int4_codes(layer, self._axis(self.context.input_size))

    def _axis(self, input_size: int) -> int | None:
        """The axis along which the stored weight is packed; nothing but the shapes tells."""
        form = self.context.form
        if not form:
            return 1 if input_size % 2 == 0 else None
        if packed_along_out(form):
            return 0
        return 1 if groups_of(self.context) == 1 and form.shape("weight", ())[1:] != (input_size,) else None
