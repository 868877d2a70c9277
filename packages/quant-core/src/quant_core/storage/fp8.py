"""FP8 weights with one scale per output channel."""

import torch
from torch import Tensor

from quant_core.schemes.params import Param, float_values, no_nan, positive, zero
from quant_core.storage.base import Storage, Tensors
from quant_core.storage.integer import symmetric_scale

#: The largest finite E4M3 value.
LARGEST = 448.0


class FP8Storage(Storage):
    """q · weight_scale.

    Stored:
        weight: float8_e4m3fn [out, in]
        weight_scale: float [out, 1]
        weight_offset: float [out, 1], zero, where there is one
    """

    def keeps(self) -> bool:
        """E4M3 per channel, one value to a byte."""
        weight = self.weight
        found = (weight.type, weight.num_bits, weight.strategy, weight.packing, weight.scale_dtype, weight.outer)
        return found == ("float", 8, "channel", None, None, None)

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        return {"weight": fp8_weight(input_size, output_size)}

    def get_perchannel_param(self, output_size: int) -> dict[str, Param]:
        """`weight_scale` and `weight_offset`."""
        checks = {"weight_scale": positive, "weight_offset": zero}
        return {
            name: Param(
                (output_size, 1), self.form.float_dtype(name), output_dim=0, check=check, dummy=float(check is positive)
            )
            for name, check in checks.items()
            if name == "weight_scale" or self.form.has(name, default=True)
        }

    def dequantize(self, tensors: Tensors) -> Tensor:
        """Weight times scale."""
        return tensors["weight"].to(torch.float32) * float_values(tensors["weight_scale"])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel becomes 448."""
        scale = symmetric_scale(weight, LARGEST)
        codes = (weight.to(torch.float32) / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def fp8_weight(input_size: int, output_size: int) -> Param:
    """An E4M3 weight [out, in]."""
    return Param((output_size, input_size), torch.float8_e4m3fn, output_dim=0, input_dim=1, check=no_nan)
