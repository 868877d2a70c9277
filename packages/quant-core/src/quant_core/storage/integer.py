"""int8 and int4 weights, per tensor, per channel or per group, symmetric or not, packed or not."""

import math

import torch
from torch import Tensor

from quant_core.packing import pack, unpack
from quant_core.schemes.params import Param, ValueCheck, finite, float_values, int4, positive, zero
from quant_core.storage.base import Storage, Tensors, expanded, ones_where_zero, unequal
from quant_core.storage.fitting import GroupIndex, PackedZero, fitting_groups, unfilled


class IntegerStorage(Storage):
    """(q - weight_offset) · weight_scale, and · weight_channel_scale where scales are in two stages.

    Stored, with g groups of input features (1: per channel):
        weight: int8 [out, in]; packed, an axis is as many times shorter as there are values in one element
        weight_scale: float [out, g]; per tensor [1], or a scalar
        weight_offset: any number as the scale, where there is one; zero for symmetric types; it may be packed too
        weight_channel_scale, weight_channel_offset: float [out, 1], of the first of two stages; the offset is zero
        weight_g_idx: int32 [in], the group of each input feature, where groups are not made of neighbours
    """

    def keeps(self) -> bool:
        """Integers of 4 or 8 bits, per tensor, channel or group; above those of groups there may be one per channel."""
        weight = self.weight
        return (
            (weight.type, weight.scale_dtype) == ("int", None)
            and weight.num_bits in (4, 8)
            and weight.strategy in ("tensor", "channel", "group")
            and weight.outer in ((None,) if weight.strategy == "tensor" else (None, "channel"))
            and (weight.strategy == "group" or not weight.indexed)
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
        """Scales and offsets, one group being per channel, and the index of groups."""
        params = self._pair("weight_scale", "weight_offset", input_size, output_size, self.groups(input_size))
        if self.weight.indexed:
            dtype = torch.int64 if self.form.dtype("weight_g_idx", torch.int32) == torch.int64 else torch.int32
            check = GroupIndex(self.groups(input_size), input_size)
            params["weight_g_idx"] = Param((input_size,), dtype, input_dim=0, shared=True, check=check, dummy=0.0)
        if self.weight.outer == "channel":
            params |= self._pair("weight_channel_scale", "weight_channel_offset", input_size, output_size, 1)
        return params

    def _pair(self, scale: str, offset: str, input_size: int, output_size: int, groups: int) -> dict[str, Param]:
        params = {scale: self._values(scale, self.form.float_dtype(scale), input_size, output_size, groups, positive)}
        # Who states integers as zero points has them; a float offset is left out where all are zero.
        stated = offset == "weight_offset" and not self.weight.symmetric and self.weight.offset_type == "int"
        if stated or self.form.has(offset, default=True):
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
        if self.weight.strategy == "tensor":
            shape = self.form.shape(name, (1,))
            return Param(
                shape if shape == () else (1,),
                dtype,
                per_row=True,
                check=check,
                dummy=1.0 if check is positive else 0.0,
            )
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
            check=check if packing is None else PackedZero(packing, self.weight.num_bits) if check is zero else None,
            dummy=1.0 if check is positive else 0.0,
        )

    def reasons_against(self, input_size: int) -> list[str]:
        """Whole groups and whole elements of packed values only."""
        groups, size = self.groups(input_size), self.weight.group_size
        if groups > 1 and size is not None and input_size % size:
            reason = unequal(self.form, "weight_scale", input_size, groups)
            return [f"{reason}; {fitting_groups(input_size, size)} would fit"]
        packing = self.weight.offset_packing
        values = {"weight": (input_size, self.weight.steps()[1])}
        if packing is not None and packing.axis == 1:
            values["weight_offset"] = (groups, packing.values)
        what = {"weight": "input features", "weight_offset": "groups"}
        return [unfilled(name, what[name], *sizes) for name, sizes in values.items() if sizes[0] % sizes[1]]

    def reasons_against_outputs(self, output_size: int) -> list[str]:
        """Whole elements of packed values only."""
        packing = self.weight.offset_packing
        values = {"weight": self.weight.steps()[0]}
        if packing is not None and packing.axis == 0:
            values["weight_offset"] = packing.values
        return [
            unfilled(name, "output features", output_size, count)
            for name, count in values.items()
            if output_size % count
        ]

    def codes(self, tensors: Tensors) -> Tensor:
        """q, int8 [out, in]."""
        return unpack(tensors["weight"], self.weight.packing, self.weight.num_bits)

    def scale(self, tensors: Tensors) -> Tensor:
        """The scale of each group, of both stages: float32 [out, g]; [1, 1] of one value as it is stored."""
        scale = _matrix(float_values(tensors["weight_scale"]))
        return scale * float_values(tensors["weight_channel_scale"]) if self.weight.outer == "channel" else scale

    def offset(self, tensors: Tensors) -> Tensor | None:
        """The offset of each group, float32 [out, g]; None where none is stored."""
        if "weight_offset" not in tensors:
            return None
        packing = None if self.weight.strategy == "tensor" else self.weight.offset_packing
        return _matrix(unpack(tensors["weight_offset"], packing, self.weight.num_bits).to(torch.float32))

    def order(self, tensors: Tensors) -> Tensor | None:
        """The input features with those of a group beside each other, int64 [in]; None where they are so already."""
        if not self.weight.indexed:
            return None
        return torch.argsort(tensors["weight_g_idx"], stable=True)

    def dequantize(self, tensors: Tensors) -> Tensor:
        """(q - offset) · scale, group by group."""
        codes, offset = self.codes(tensors), self.offset(tensors)
        values = codes.to(torch.float32)
        if offset is not None:
            values = values - self._of_features(offset, tensors, codes.shape[1])
        return values * self._of_features(self.scale(tensors), tensors, codes.shape[1])

    def _of_features(self, values: Tensor, tensors: Tensors, input_size: int) -> Tensor:
        """Values of groups [out, g] as values of input features [out, in]."""
        if self.weight.indexed:
            return values[:, tensors["weight_g_idx"].to(torch.int64)]
        return expanded(values, input_size)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of what shares a scale becomes 127, or 7 of int4. In two stages, the first
        is the largest scale among a channel's groups. Offsets are zero, and groups made of neighbours.
        """
        groups = self.groups(weight.shape[1])
        maximum = 2 ** (self.weight.num_bits - 1) - 1
        shape = (1,) if self.weight.strategy == "tensor" else (weight.shape[0], groups)
        rows = weight.to(torch.float32).reshape(math.prod(shape), -1)
        row_scale = symmetric_scale(rows, maximum)
        codes = (rows / row_scale).round().clamp(-maximum - 1, maximum).to(torch.int8).view(weight.shape)
        scale = row_scale.view(shape)
        stored = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        if self.weight.offset_packing is not None:
            zeros = torch.zeros(shape, dtype=torch.int8)
            stored["weight_offset"] = pack(zeros, self.weight.offset_packing, self.weight.num_bits)
        if self.weight.indexed:
            places = torch.arange(weight.shape[1], dtype=torch.int32)
            stored["weight_g_idx"] = places // (weight.shape[1] // groups)
        if self.weight.outer == "channel":
            first = scale.amax(dim=1, keepdim=True)
            stored |= {"weight_scale": scale / first, "weight_offset": torch.zeros(scale.shape, dtype=torch.int64)}
            stored |= {"weight_channel_scale": first, "weight_channel_offset": torch.zeros_like(first)}
        return {"weight": pack(codes, self.weight.packing, self.weight.num_bits), **stored}


def _matrix(values: Tensor) -> Tensor:
    """Values [out, g] as they are, a single one as [1, 1]."""
    return values if values.dim() == 2 else values.reshape(-1, 1)


def symmetric_scale(weight: Tensor, maximum: float) -> Tensor:
    """Scale of each row [out, 1] float32: the largest magnitude becomes `maximum`. A zero row gets 1."""
    return ones_where_zero(weight.to(torch.float32).abs().amax(dim=1, keepdim=True) / maximum)
