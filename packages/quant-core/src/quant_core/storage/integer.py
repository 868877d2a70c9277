"""int8 and int4 weights, per tensor, per channel or per group, symmetric or not, packed or not."""

import torch
from torch import Tensor

from quant_core.packing import pack, unpack
from quant_core.schemes.params import Param, ValueCheck, finite, float_values, int4, positive, zero
from quant_core.storage.base import Storage, Tensors, expanded, ones_where_zero, unequal


class IntegerStorage(Storage):
    """(q - weight_offset) · weight_scale, and · weight_channel_scale where scales are in two stages.

    Stored, with g groups of input features (1: per channel):
        weight: int8 [out, in]; packed, an axis is as many times shorter as there are values in one element
        weight_scale: float [out, g]
        weight_offset: any number [out, g], where there is one; zero for symmetric types
        weight_channel_scale, weight_channel_offset: float [out, 1], of the first of two stages; the offset is zero
    """

    def keeps(self) -> bool:
        """Integers of 4 or 8 bits, per channel or group, with a scale per channel above the groups' or without."""
        weight = self.weight
        return (
            (weight.type, weight.scale_dtype) == ("int", None)
            and weight.num_bits in (4, 8)
            and weight.strategy in ("channel", "group")
            and weight.outer in (None, "channel")
        )

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        packing, (out_step, in_step) = self.weight.packing, self.weight.steps()
        return {
            "weight": Param(
                (output_size // out_step, input_size // in_step),
                torch.int8 if packing is None else packing.container(self.weight.num_bits),
                output_dim=0,
                input_dim=1,
                output_step=out_step,
                input_step=in_step,
                check=int4 if packing is None and self.weight.num_bits == 4 else None,
            )
        }

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """Scales and offsets; one group is per channel."""
        params = self._pair("weight_scale", "weight_offset", input_size, output_size, self.groups(input_size))
        if self.weight.outer == "channel":
            params |= self._pair("weight_channel_scale", "weight_channel_offset", input_size, output_size, 1)
        return params

    def _pair(self, scale: str, offset: str, input_size: int, output_size: int, groups: int) -> dict[str, Param]:
        params = {scale: self._values(scale, self.form.float_dtype(scale), input_size, output_size, groups, positive)}
        if self.form.has(offset, default=True):
            # The first of two stages has none in any type.
            check = zero if self.weight.symmetric or scale == "weight_channel_scale" else finite
            params[offset] = self._values(offset, self._offset_dtype(offset), input_size, output_size, groups, check)
        return params

    def _offset_dtype(self, name: str) -> torch.dtype:
        stored = self.form.dtype(name, torch.float32)
        if self.weight.offset_type == "int" and not (stored.is_floating_point or stored == torch.bool):
            return stored
        return self.form.float_dtype(name)

    def _values(
        self, name: str, dtype: torch.dtype, input_size: int, output_size: int, groups: int, check: ValueCheck
    ) -> Param:
        packing = self.weight.offset_packing if name == "weight_offset" else None
        steps = [packing.values if packing is not None and packing.axis == axis else 1 for axis in (0, 1)]
        length = (self.weight.group_size or input_size) * steps[1]
        return Param(
            (output_size // steps[0], groups // steps[1]),
            dtype if packing is None else packing.container(self.weight.num_bits),
            output_dim=0,
            input_dim=1 if groups > 1 else None,
            output_step=steps[0],
            input_step=length if groups > 1 else 1,
            check=None if packing is not None else check,
            dummy=1.0 if check is positive else 0.0,
        )

    def reasons_against(self, input_size: int) -> list[str]:
        """Whole groups only."""
        groups = self.groups(input_size)
        if input_size % groups == 0:
            return []
        return [unequal(self.form, "weight_scale", input_size, groups)]

    def codes(self, tensors: Tensors) -> Tensor:
        """q, int8 [out, in]."""
        return unpack(tensors["weight"], self.weight.packing, self.weight.num_bits)

    def scale(self, tensors: Tensors) -> Tensor:
        """The scale of each group, of both stages: float32 [out, g]."""
        scale = float_values(tensors["weight_scale"])
        return scale * float_values(tensors["weight_channel_scale"]) if self.weight.outer == "channel" else scale

    def offset(self, tensors: Tensors) -> Tensor | None:
        """The offset of each group, float32 [out, g]; None where none is stored."""
        if "weight_offset" not in tensors:
            return None
        return unpack(tensors["weight_offset"], self.weight.offset_packing, self.weight.num_bits).to(torch.float32)

    def dequantize(self, tensors: Tensors) -> Tensor:
        """(q - offset) · scale, group by group."""
        codes, offset = self.codes(tensors), self.offset(tensors)
        values = codes.to(torch.float32)
        if offset is not None:
            values = values - expanded(offset, codes.shape[1])
        return values * expanded(self.scale(tensors), codes.shape[1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel or group becomes 127, or 7 of int4. In two stages, the first is
        the largest scale among a channel's groups. Offsets are zero.
        """
        groups = self.groups(weight.shape[1])
        maximum = 2 ** (self.weight.num_bits - 1) - 1
        rows = weight.to(torch.float32).reshape(weight.shape[0] * groups, -1)
        row_scale = symmetric_scale(rows, maximum)
        codes = (rows / row_scale).round().clamp(-maximum - 1, maximum).to(torch.int8).view(weight.shape)
        scale = row_scale.view(weight.shape[0], groups)
        stored = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        if self.weight.outer == "channel":
            first = scale.amax(dim=1, keepdim=True)
            stored |= {"weight_scale": scale / first, "weight_offset": torch.zeros(scale.shape, dtype=torch.int64)}
            stored |= {"weight_channel_scale": first, "weight_channel_offset": torch.zeros_like(first)}
        return {"weight": pack(codes, self.weight.packing, self.weight.num_bits), **stored}


def symmetric_scale(weight: Tensor, maximum: float) -> Tensor:
    """Scale of each row [out, 1] float32: the largest magnitude becomes `maximum`. A zero row gets 1."""
    return ones_where_zero(weight.to(torch.float32).abs().amax(dim=1, keepdim=True) / maximum)
