"""Microscaled (MX) weights: FP8 or FP4 in blocks of 32 input features that share a power of two."""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.schemes.params import Param, no_nan_exponent, positive
from quant_core.storage.base import Storage, Tensors, expanded, groups_of, ones_where_zero, unequal
from quant_core.storage.fp8 import fp8_weight
from quant_core.stored import Packing


class MicroscaledStorage(Storage):
    """q · 2^(weight_scale - 127), and · weight_dual_scale where there is a scale above the powers of two.

    Stored, with g outer groups of input features:
        weight: float8_e4m3fn [out, in], or uint8 [out, in / 2], two E2M1 values to a byte, the first in its lower half
        weight_scale: uint8 [out, ceil(in / 32)], exponents
        weight_dual_scale: float [out, g, 1], where there is an outer scale
    """

    def keeps(self) -> bool:
        """E4M3, or E2M1 in pairs along the input features, in blocks of 32 with exponents."""
        weight, pairs = self.weight, Packing(1)
        kinds = {(8, None), (4, pairs)}
        return (
            (weight.type, weight.strategy, weight.group_size, weight.scale_dtype)
            == ("float", "group", mx.BLOCK, torch.uint8)
            and (weight.num_bits, weight.packing) in kinds
            and weight.outer in (None, "group")
        )

    @property
    def fp4(self) -> bool:
        """Whether the weight is FP4."""
        return self.weight.num_bits == 4

    def outer_groups(self, input_size: int) -> int:
        """How many groups with an outer scale so many input features form."""
        return groups_of(input_size, self.weight.outer_group_size)

    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight`."""
        if not self.fp4:
            return {"weight": fp8_weight(input_size, output_size)}
        return {"weight": Param((output_size, input_size // 2), torch.uint8, output_dim=0, input_dim=1, input_step=2)}

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """`weight_scale` and `weight_dual_scale`."""
        params = {
            "weight_scale": Param(
                (output_size, mx.blocks_of(input_size)),
                torch.uint8,
                output_dim=0,
                input_dim=1,
                input_step=mx.BLOCK,
                check=no_nan_exponent,
                dummy=mx.E8M0_ONE,
            )
        }
        if self.weight.outer == "group":
            groups = self.outer_groups(input_size)
            params["weight_dual_scale"] = Param(
                (output_size, groups, 1),
                self.form.float_dtype("weight_dual_scale"),
                output_dim=0,
                input_dim=1,
                input_step=-(-input_size // groups),
                check=positive,
                dummy=1.0,
            )
        return params

    def reasons_against(self, input_size: int) -> list[str]:
        """Whole bytes, and equal outer groups of whole pairs of blocks."""
        reasons = []
        if self.fp4 and input_size % 2:
            reasons.append(f"{input_size} input features are no whole number of bytes with two FP4 values each")
        groups = self.outer_groups(input_size)
        if input_size % groups:
            reasons.append(unequal(self.form, "weight_dual_scale", input_size, groups))
        elif groups > 1 and (length := input_size // groups) % (2 * mx.BLOCK):
            found = self.form.found("weight_dual_scale")
            which = f": {found}, for {input_size} input features" if found else ""
            reasons.append(f"groups of {length} input features are no multiple of {2 * mx.BLOCK}{which}")
        return reasons

    def dequantize(self, tensors: Tensors) -> Tensor:
        """Elements times their block's power of two, and times the outer scale."""
        weight = tensors["weight"]
        values = mx.e2m1_values(mx.unpack_e2m1(weight)) if self.fp4 else weight.to(torch.float32)
        values = mx.scale_blocks_(values, mx.e8m0_values(tensors["weight_scale"]))
        if self.weight.outer != "group":
            return values
        return values * expanded(tensors["weight_dual_scale"].squeeze(-1).to(torch.float32), values.shape[1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As msModelSlim chooses exponents from each block's largest magnitude.

        FP8 has floor(log2(max)) - 8 as exponent and saturates beyond 448. FP4 has floor(log2(max · 8/7)) - 2, so that a
        block reaches to 7 and is clipped at 6; its ties go away from zero. With an outer scale, the largest magnitude
        of its group becomes 6 first.
        """
        values, outer = weight.to(torch.float32), {}
        if self.weight.outer == "group":
            groups = values.unflatten(1, (self.outer_groups(weight.shape[1]), -1))
            outer["weight_dual_scale"] = ones_where_zero(groups.abs().amax(-1, keepdim=True) / mx.E2M1_MAX)
            values = (groups / outer["weight_dual_scale"]).flatten(1)
        blocks = mx.in_blocks(values)
        peaks = blocks.abs().amax(-1)
        exponents = mx.floor_exponents(peaks * 8 / 7, 2) if self.fp4 else mx.floor_exponents(peaks, 8)
        scaled = (blocks / mx.e8m0_values(exponents)[..., None]).flatten(-2)[:, : weight.shape[1]]
        if self.fp4:
            codes = mx.pack_e2m1(mx.e2m1_codes(scaled, ties_away=True))
        else:
            codes = scaled.clamp(-mx.E4M3_MAX, mx.E4M3_MAX).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": exponents, **outer}
