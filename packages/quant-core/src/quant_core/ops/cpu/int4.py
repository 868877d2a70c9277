"""int4 operands, eight values to an int32: value j of the packed axis in bits 4j to 4j + 3, two's complement."""

import torch
from torch import Tensor

from quant_core.packing import pack_eights, unpack_eights


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Pack the last axis.

    Args:
        weight: int32 [..., k], two or three axes, values from -8 to 7; of others the lowest four bits are taken.
        inner_k_tiles: ignored, as on the device.

    Returns:
        int32 [..., k / 8].

    Raises:
        NotImplementedError: for a dtype other than int32.
        ValueError: for a k that is not a multiple of 8, or another number of axes.

    """
    if weight.dtype != torch.int32:
        raise NotImplementedError(f"npu_convert_weight_to_int4pack: the CPU kernel packs int32, not {weight.dtype}")
    if weight.dim() not in (2, 3) or weight.shape[-1] % 8:
        raise ValueError(
            f"npu_convert_weight_to_int4pack: the weight is {list(weight.shape)}, expected two or three axes and a "
            "multiple of 8 on the last"
        )
    return pack_eights(weight)


def int8_operands(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of an int4 product as int8.

    Args:
        x1: int32 [..., m, k / 8].
        x2: int32 [..., k / 8, n] or [..., k, n / 8].

    Raises:
        ValueError: for a k that fits neither.

    """
    return unpack_eights(x1), int8_weight(x2, x1.shape[-1] * 8)


def int8_weight(weight: Tensor, k: int) -> Tensor:
    """A packed weight as int8 [..., k, n].

    Args:
        weight: int32 [..., k / 8, n], packed along k, or [..., k, n / 8], packed along n. The shape tells: a compiler
            may lose the strides by which the device does.
        k: the input features.

    Raises:
        ValueError: for a weight that fits neither.

    """
    if weight.shape[-2] == k:
        return unpack_eights(weight)
    if weight.shape[-2] * 8 == k:
        return unpack_eights(weight.transpose(-1, -2)).transpose(-1, -2)
    raise ValueError(f"a weight of int4 in int32 {list(weight.shape)} has not {k} input features")
