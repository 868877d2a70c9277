"""FP8 weights with one scale per tensor, per output channel, or per block of rows and columns."""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.schemes.params import Param, float_values, no_nan, positive, zero
from quant_core.storage.base import Storage, Tensors, groups_of, ones_where_zero

#: The largest finite E4M3 value.
LARGEST = mx.E4M3_MAX


class FP8Storage(Storage):
    """q · weight_scale.

    Stored:
        weight: float8_e4m3fn [out, in]
        weight_scale: float [out, 1]; per tensor () or [1]; in blocks of r rows and c columns [ceil(out / r),
            ceil(in / c)], the last of which may be partial
        weight_offset: as weight_scale, zero, where there is one

    What is stored for several output features is handed over once for each of them (`Param.per_row`): scales are then
    [out, g], with g blocks of input features, whatever shared them.
    """

    def keeps(self) -> bool:
        """E4M3 per tensor, channel or block, one value to a byte."""
        weight = self.weight
        found = (weight.type, weight.num_bits, weight.packing, weight.scale_dtype, weight.outer)
        blocks = weight.block_structure is not None and min(weight.block_structure) > 0
        shared = weight.strategy in ("tensor", "channel") or (weight.strategy == "block" and blocks)
        return found == ("float", 8, None, None, None) and shared

    @property
    def block(self) -> tuple[int, int | None]:
        """Rows and columns that share a scale, where more than a channel does; None for all columns."""
        return self.weight.block_structure or (1, None) if self.weight.strategy == "block" else (1, None)

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        return {"weight": fp8_weight(input_size, output_size)}

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight_scale` and `weight_offset`."""
        params = {"weight_scale": self._values("weight_scale", input_size, output_size)}
        if self.form.has("weight_offset", default=self.weight.strategy == "channel"):
            params["weight_offset"] = self._values("weight_offset", input_size, output_size)
        return params

    def _values(self, name: str, input_size: int, output_size: int) -> Param:
        dtype, scale = self.form.float_dtype(name), name == "weight_scale"
        check, dummy = positive if scale else zero, float(scale)
        if self.weight.strategy == "tensor":
            return Param(self.form.single(name), dtype, per_row=True, check=check, dummy=dummy)
        (rows, columns), groups = self.block, groups_of(input_size, self.block[1])
        return Param(
            (-(-output_size // rows), groups),
            dtype,
            output_dim=0,
            input_dim=None if columns is None else 1,
            output_step=rows,
            input_step=columns or 1,
            per_row=self.weight.strategy == "block",
            check=check,
            dummy=dummy,
        )

    def dequantize(self, tensors: Tensors) -> Tensor:
        """Weight times scale."""
        values, scale = tensors["weight"].to(torch.float32), float_values(tensors["weight_scale"])
        return mx.combine_blocks_(Tensor.mul_, values, scale, self.block[1] or values.shape[1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of what shares a scale becomes 448."""
        values = weight.to(torch.float32)
        (out, inputs), (rows, columns) = values.shape, self.block
        if self.weight.strategy == "tensor":
            rows = out
        columns = columns or inputs
        padded = torch.nn.functional.pad(values, (0, -inputs % columns, 0, -out % rows))
        peaks = padded.view(padded.shape[0] // rows, rows, -1, columns).abs().amax((1, 3))
        scale = ones_where_zero(peaks / LARGEST)
        each = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:out, :inputs]
        codes = (values / each).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        if self.weight.strategy != "channel":
            return {"weight": codes, "weight_scale": scale.flatten() if self.weight.strategy == "tensor" else scale}
        return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def fp8_weight(input_size: int, output_size: int) -> Param:
    """An E4M3 weight [out, in]."""
    return Param((output_size, input_size), torch.float8_e4m3fn, output_dim=0, input_dim=1, check=no_nan)
