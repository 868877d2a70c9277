"""NVFP4 weights: FP4 in groups of 16 input features that share an E4M3 scale, and one scale for all of the tensor."""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.schemes.params import Param, float_values, not_negative, positive
from quant_core.storage.base import Storage, Tensors, groups_of, ones_where_zero, unequal
from quant_core.stored import Packing

#: Input features that share an E4M3 scale.
GROUP = 16


class NVFP4Storage(Storage):
    """q · weight_scale / weight_global_scale.

    Stored:
        weight: uint8 [out, in / 2], two E2M1 values to a byte, the first in its lower half
        weight_scale: float8_e4m3fn [out, in / 16]
        weight_global_scale: float32 () or [1], which scales above are divided by; handed over for each row, [out, 1]
    """

    def keeps(self) -> bool:
        """E2M1 in pairs along the input features, in groups of 16 with E4M3 scales and one above all of them."""
        weight = self.weight
        return (weight.type, weight.num_bits, weight.packing) == ("float", 4, Packing(1)) and (
            weight.strategy,
            weight.group_size,
            weight.scale_dtype,
            weight.outer,
        ) == ("group", GROUP, torch.float8_e4m3fn, "tensor")

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        return {"weight": Param((output_size, input_size // 2), torch.uint8, output_dim=0, input_dim=1, input_step=2)}

    def get_pertensor_param(self) -> dict[str, Param]:
        """`weight_global_scale`."""
        name = "weight_global_scale"
        dtype = self.form.float_dtype(name)
        return {name: Param(self.form.single(name), dtype, per_row=True, check=positive, dummy=1.0)}

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight_scale`."""
        return {
            "weight_scale": Param(
                (output_size, groups_of(input_size, GROUP)),
                torch.float8_e4m3fn,
                output_dim=0,
                input_dim=1,
                input_step=GROUP,
                check=not_negative,
                dummy=1.0,
            )
        }

    def reasons_against(self, input_size: int) -> list[str]:
        """Whole groups only."""
        if input_size % GROUP == 0:
            return []
        return [unequal(self.form, "weight_scale", input_size, groups_of(input_size, GROUP))]

    def dequantize(self, tensors: Tensors) -> Tensor:
        """Elements times the scale of their group, divided by the tensor's."""
        values = mx.e2m1_values(mx.unpack_e2m1(tensors["weight"]))
        scale = tensors["weight_scale"].to(torch.float32) / float_values(tensors["weight_global_scale"])
        return mx.combine_blocks_(Tensor.mul_, values, scale, GROUP)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The largest scale becomes 448, and the largest magnitude of a group 6, up to the rounding of its scale."""
        groups = weight.to(torch.float32).unflatten(1, (weight.shape[1] // GROUP, GROUP))
        peaks = groups.abs().amax(-1)
        outer = mx.E4M3_MAX * mx.E2M1_MAX / ones_where_zero(peaks.amax()).reshape(1)
        scale = (peaks * (outer / mx.E2M1_MAX)).clamp(max=mx.E4M3_MAX).to(torch.float8_e4m3fn)
        inner = ones_where_zero(scale.to(torch.float32)) / outer
        codes = mx.pack_e2m1(mx.e2m1_codes((groups / inner[..., None]).flatten(1)))
        return {"weight": codes, "weight_scale": scale, "weight_global_scale": outer}
