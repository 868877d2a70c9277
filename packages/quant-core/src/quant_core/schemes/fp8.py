"""What the FP8 types that have an operator compute alike: E4M3 weights per channel or tensor, by E4M3 activations."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.mx import MX_DEVICES, run_time_weight
from quant_core.schemes.params import float_values, replace_parameter, tensor_of
from quant_core.schemes.run_time import drop
from quant_core.storage.fp8 import LARGEST
from quant_core.stored import WeightForm


class FP8LinearScheme(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = E4M3(x / x_scale); a type says where x_scale comes from.

    Run time:
        weight: float8_e4m3fn [in, out], a view of what is stored; on CPU: bfloat16 [in, out], twice the memory
        weight_scale: float32 [out]; the same for all rows of a member where it is stored per tensor
    """

    granularity = ("per channel", "per tensor")
    supported_devices = MX_DEVICES
    strategies = ("channel", "tensor")

    stores = WeightForm(type="float")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose the weight, drop the offset, which is zero."""
        replace_parameter(layer, "weight", run_time_weight(layer.get_parameter("weight").data).t())
        replace_parameter(layer, "weight_scale", float_values(layer.get_parameter("weight_scale").data).flatten())
        drop(layer, "weight_offset")


def fp8_codes(rows: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of rows [m, k], given a scale for each of them [m], or one for all [1]."""
    quotients = rows.to(torch.float32) / scale[:, None]
    return quotients.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def fp8_multiply(
    layer: nn.Module, codes: Tensor, x_scale: Tensor, bias: Tensor | None, to: torch.dtype, rows: slice | None = None
) -> Tensor:
    """npu_quant_matmul of FP8 codes with a layer's weight.

    Args:
        layer: holds the processed parameters.
        codes: [m, in].
        x_scale: float32 [m]. A scale that is not per token would be cut to 19 bits for some results.
        bias: [out].
        to: the result's dtype.
        rows: which of the layer's output features; None for all.

    Returns:
        [m, out].

    """
    weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
    if rows is not None:
        weight, scale, bias = weight[:, rows], scale[rows], None if bias is None else bias[rows]
    y: Tensor = torch.ops.npu.npu_quant_matmul(
        codes,
        weight,
        scale,
        pertoken_scale=x_scale,
        bias=None if bias is None else bias.to(torch.float32),
        output_dtype=to,
    )
    return y
