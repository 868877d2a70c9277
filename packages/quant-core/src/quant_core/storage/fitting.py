"""Which sizes packed values and groups fit, and whether stored groups are whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.packing import unpack
from quant_core.schemes.params import zero
from quant_core.stored import Packing


@dataclass(frozen=True)
class GroupIndex:
    """ValueCheck of `weight_g_idx`: every group has as many input features as all others.

    Attributes:
        groups: how many.
        input_size: input features of all.

    """

    groups: int
    input_size: int

    def __call__(self, stored: Tensor) -> str | None:
        """What is wrong with the groups of the input features."""
        wrong = (stored < 0) | (stored >= self.groups)
        if bool(wrong.any()):
            example = int(stored[wrong][0])
            return (
                f"{int(wrong.sum())} of {stored.numel()} values are not groups from 0 to {self.groups - 1}: {example}"
            )
        size, counts = self.input_size // self.groups, torch.bincount(stored.flatten(), minlength=self.groups)
        uneven = (counts != size).nonzero().flatten().tolist()
        if not uneven:
            return None
        return f"group {uneven[0]} has {int(counts[uneven[0]])} input features, and not {size} as all groups have"


@dataclass(frozen=True)
class PackedZero:
    """ValueCheck of packed offsets of a symmetric type: zero.

    Attributes:
        packing: of the offsets.
        num_bits: of each.

    """

    packing: Packing
    num_bits: int

    def __call__(self, stored: Tensor) -> str | None:
        """What is wrong with the offsets."""
        return zero(unpack(stored, self.packing, self.num_bits))


def unfilled(tensor: str, what: str, size: int, values: int) -> str:
    """Why so many of something cannot be packed by so many in one element, with the numbers that can."""
    below, above = size // values * values, -(-size // values) * values
    fitting = f"{below} or {above}" if below else f"{above}"
    return (
        f"{size} {what} do not fill elements of {values} values, as {tensor} is packed: {fitting} would fit, or any "
        f"multiple of {values}"
    )


def fitting_groups(input_size: int, group_size: int) -> str:
    """The lengths of groups next to one that does not divide the input features."""
    below = next(size for size in range(group_size, 0, -1) if input_size % size == 0)
    above = next(size for size in range(group_size, input_size + 1) if input_size % size == 0)
    return f"groups of {below} or {above} input features"
