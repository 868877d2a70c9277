"""int8 weights beside activations that are quantised with stored scales."""

import torch
from torch import Tensor

from quant_core.schemes.params import Param, float_values, integral_int8, positive, zero
from quant_core.storage.base import Storage, Tensors
from quant_core.storage.integer import IntegerStorage
from quant_core.stored import StoredForm


def input_params(form: StoredForm) -> dict[str, Param]:
    """`input_scale` and `input_offset`, in the dtype they are stored in: rounding the scale is a gain error.

    Each is one value, [1] or a scalar. A symmetric input has no offset, or one that is zero.
    """
    symmetric = form.input is not None and form.input.symmetric
    scale_shape, offset_shape = (
        () if form.shape(name, (1,)) == () else (1,) for name in ("input_scale", "input_offset")
    )
    params = {"input_scale": Param(scale_shape, form.float_dtype("input_scale"), check=positive, dummy=1.0)}
    if not symmetric or form.has("input_offset"):
        dtype = form.dtype("input_offset", torch.float32)
        dtype = dtype if dtype == torch.int8 else form.float_dtype("input_offset")
        params["input_offset"] = Param(offset_shape, dtype, check=zero if symmetric else integral_int8, dummy=0.0)
    return params


class StaticStorage(Storage):
    """q · deq_scale / input_scale; deq_scale is the weight's scale times the input's, folded by the writer.

    Stored:
        weight: int8 [out, in]
        input_scale, input_offset: float [1] or a scalar, the offset also int8
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
        """`input_scale` and `input_offset`."""
        return input_params(self.form)

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


class UnfoldedStorage(IntegerStorage):
    """A weight as it is without its input, and beside it what the input is quantised with.

    Stored, beside what `IntegerStorage` has:
        input_scale, input_offset: float [1] or a scalar, the offset also int8, for inputs that are not symmetric
    """

    def get_pertensor_param(self) -> dict[str, Param]:
        """`input_scale` and `input_offset`."""
        return input_params(self.form)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Only calibration finds the input's scale."""
        return Storage.quantize(self, weight)
