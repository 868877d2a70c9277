"""The form in which integer weights go to the operators, shared by the types that multiply by them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_core.devices import current_device
from quant_core.ops.cpu.packed import pack
from quant_core.packing import pack_eights
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import replace_parameter

#: The storage layout that matrix units read fastest.
FRACTAL_NZ = 29


def process_int8_weight(layer: nn.Module, codes: Tensor) -> None:
    """[out, in] becomes `weight` [in, out], as the matmul operators take it, in the device's layout."""
    weight = codes.t()
    if weight.device.type != "cpu":  # which has no other layout: a copy would take memory and time for nothing
        weight = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)
    replace_parameter(layer, "weight", weight)


def process_int4_weight(layer: nn.Module, codes: Tensor, packed: bool) -> None:
    """`weight` with eight output features to an int32 [in, out / 8], or int8 [in, out].

    The packed one is not cast to the NZ layout, which not all operators take.
    """
    if packed:
        replace_parameter(layer, "weight", pack_eights(codes.t()))
    else:
        process_int8_weight(layer, codes)


def pack_each(weights: Tensor) -> list[Tensor] | None:
    """int8 weights [E, in, out], packed one by one for the CPU; None where this processor multiplies none rightly."""
    packed = [found for one in weights if (found := pack(one)) is not None]
    return packed if len(packed) == len(weights) else None


def packed_at_run_time(context: LinearContext, devices: Sequence[str]) -> bool:
    """Whether a layer's weight goes to its operator as int4, which these devices take.

    On CPU it goes as int8, by the same operators' int8 form: unpacking at each call takes several times as long as the
    product for one token.
    """
    outputs = sum(shard.local_output_size for shard in context.shards)
    return current_device() in devices and outputs % 8 == 0


def drop(layer: nn.Module, *names: str) -> None:
    """Take stored tensors off a layer that does not compute with them."""
    for name in names:
        if hasattr(layer, name):
            delattr(layer, name)


def sum_of_groups(codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """int8 [m, k] times (int8 [k, n] - offset) · scale, one of each for a group [g, n] or all [n]; float32 [m, n].

    No operator multiplies int8 by int8 in groups, nor with zero points, so the int32 sums of each are completed here:
    integers with integers, which is exact.
    """
    scales = scale.view(-1, scale.shape[-1])
    offsets = None if offset is None else offset.view(scales.shape)
    length = weight.shape[0] // len(scales)
    total = torch.zeros(codes.shape[0], weight.shape[1], dtype=torch.float32, device=codes.device)
    for group in range(len(scales)):
        part = slice(group * length, (group + 1) * length)
        rows, columns = (codes, weight) if len(scales) == 1 else (codes[:, part].contiguous(), weight[part])
        sums = torch.ops.npu.npu_quant_matmul(rows, columns, scales[group], output_dtype=torch.int32)
        if offsets is not None:
            sums = sums - rows.sum(dim=-1, keepdim=True, dtype=torch.int32) * offsets[group]
        total += sums * scales[group]
    return total


def sums_of_weight(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Σ (q - offset) · scale over the input features of each output feature, float32 [out].

    What a token's zero point is multiplied by.

    Args:
        codes: int8 [out, in].
        scale: float32 [out, g].
        offset: as scale, int32 if they are whole numbers; or none.

    """
    length = codes.shape[1] // scale.shape[1]
    sums = codes.unflatten(1, (scale.shape[1], length)).sum(dim=-1, dtype=torch.int32)
    return ((sums if offset is None else sums - length * offset) * scale).sum(dim=1)
