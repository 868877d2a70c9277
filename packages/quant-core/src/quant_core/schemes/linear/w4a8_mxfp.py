"""W4A8_MXFP: FP4 weights and FP8 activations in blocks of 32 that share a power of two."""

from typing import ClassVar

import torch
from torch import nn

from quant_core import microscaling as mx
from quant_core.ops.dtypes import FLOAT4_E2M1
from quant_core.schemes.mx import MXFP4, TO_FP8, TOKENS_MXFP8, MXLinearScheme
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import FRACTAL_NZ


@register_scheme("W4A8_MXFP", "linear")
class AscendW4A8MXFPLinearMethod(MXLinearScheme):
    """Activations: exponent floor(log2(max)) - 8 per block, elements to the nearest E4M3, ties to even, up to 448.

    Run time, both as views of contiguous tensors [out, ...]:
        weight: uint8 [in / 2, out], in the layout that the device has for FP4 beside FP8; on CPU: int8 [in, out] with
            twice the values, one byte each
        weight_scale: uint8 [ceil(in / 64), out, 2]
    """

    granularity = ("blocks of 32",)
    checked_against = {"W4A8_MXFP": ("qwen3/W4A8_MXFP",)}
    stores = MXFP4
    activation = TOKENS_MXFP8
    quantisation = TO_FP8
    group_sizes: ClassVar[list[int]] = [0, 0, mx.BLOCK]
    # For these operands it wants one of two axes, in a dtype that is not documented.
    operator_adds_bias = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As for all of MX, in the device's layout."""
        laid_out = torch.ops.npu.npu_format_cast(
            layer.get_parameter("weight").data,
            FRACTAL_NZ,
            customize_dtype=torch.float8_e4m3fn,
            input_dtype=FLOAT4_E2M1,
        )
        replace_parameter(layer, "weight", laid_out)
        super().process_weights_after_loading(layer)
