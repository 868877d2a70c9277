"""What the int8 linear types share: the declared weight, and the plain quantiser."""

import torch
from torch import Tensor, nn

from quant_core.schemes.params import Param, replace_parameter

FRACTAL_NZ = 29


def int8_weight(input_size: int, output_size: int) -> dict[str, Param]:
    """`weight`, int8 [out, in], one value per byte."""
    return {"weight": Param((output_size, input_size), torch.int8, output_dim=0, input_dim=1)}


def transpose_weight(layer: nn.Module) -> None:
    """[out, in] as stored becomes [in, out] as the matmul operators take it, in the device's layout."""
    weight = layer.get_parameter("weight").data.t()
    if weight.device.type != "cpu":  # which has no other layout: a copy would take memory and time for nothing
        weight = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)
    replace_parameter(layer, "weight", weight)


def symmetric_scale(weight: Tensor, maximum: int = 127) -> Tensor:
    """Per-channel scale [out, 1] float32: the largest magnitude becomes `maximum`. A zero channel gets 1."""
    scale = weight.to(torch.float32).abs().amax(dim=1, keepdim=True) / maximum
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def int8_codes(weight: Tensor, scale: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """rint(w / scale + offset), saturated to int8."""
    return (weight.to(torch.float32) / scale + offset).round().clamp(-128, 127).to(torch.int8)


def symmetric(weight: Tensor, groups: int, maximum: int = 127) -> dict[str, Tensor]:
    """The stored tensors of a weight [out, in], in groups of input features, whose largest magnitude becomes `maximum`.

    Offsets are zero.
    """
    rows = weight.reshape(weight.shape[0] * groups, -1)
    row_scale = symmetric_scale(rows, maximum)
    scale = row_scale.view(weight.shape[0], groups)
    codes = int8_codes(rows, row_scale).view(weight.shape)
    return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
