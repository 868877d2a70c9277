"""int8 weights beside activations that are quantised with stored scales, all folded into what the product needs."""

import torch
from torch import Tensor

from quant_core.schemes.params import Param, float_values, integral_int8, positive
from quant_core.storage.base import Storage, Tensors


class StaticStorage(Storage):
    """q · deq_scale / input_scale; deq_scale is the weight's scale times the input's, folded by the writer.

    Stored:
        weight: int8 [out, in]
        input_scale, input_offset: float [1], the offset also int8
        deq_scale: float32 [out], or int64 [out] holding its bits
        quant_bias: int32 [out], the zero point's correction and the layer's bias in units of deq_scale
        weight_scale, weight_offset: float [out, 1], by some writers; deq_scale has them already
    """

    def keeps(self) -> bool:
        """int8 per channel, one value to a byte."""
        weight = self.weight
        found = (weight.type, weight.num_bits, weight.strategy, weight.packing, weight.scale_dtype, weight.outer)
        return found == ("int", 8, "channel", None, None, None)

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        return {"weight": Param((output_size, input_size), torch.int8, output_dim=0, input_dim=1)}

    def get_pertensor_param(self) -> dict[str, Param]:
        """`input_scale` and `input_offset`, in the dtype they are stored in: rounding the scale is a gain error."""
        offset_dtype = self.form.dtype("input_offset", torch.float32)
        if offset_dtype != torch.int8:
            offset_dtype = self.form.float_dtype("input_offset")
        return {
            "input_scale": Param((1,), self.form.float_dtype("input_scale"), check=positive, dummy=1.0),
            "input_offset": Param((1,), offset_dtype, check=integral_int8, dummy=0.0),
        }

    def get_perchannel_param(self, output_size: int) -> dict[str, Param]:
        """`deq_scale` and `quant_bias`."""
        deq_dtype = torch.int64 if self.form.dtype("deq_scale", torch.float32) == torch.int64 else torch.float32
        return {
            "deq_scale": Param((output_size,), deq_dtype, output_dim=0, check=positive, dummy=1.0),
            "quant_bias": Param((output_size,), torch.int32, output_dim=0, dummy=0.0),
        }

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """What some writers store beside them, and nothing needs."""
        return {
            name: Param((output_size, 1), self.form.float_dtype(name), output_dim=0, dummy=0.0)
            for name in ("weight_scale", "weight_offset")
            if self.form.has(name)
        }

    def dequantize(self, tensors: Tensors) -> Tensor:
        """Weight times deq_scale / input_scale; the input scale is one, or one per output feature."""
        scale = float_values(tensors["deq_scale"]) / float_values(tensors["input_scale"])
        return tensors["weight"].to(torch.float32) * scale[:, None]
