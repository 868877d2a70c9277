"""W8A8_MXFP8 experts: FP8 weights and activations in blocks of 32 that share a power of two."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_core.ops.dtypes import FLOAT4_E2M1, FLOAT8_E8M0
from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.linear.w8a8_mxfp8 import AscendW8A8MXFP8LinearMethod
from quant_core.schemes.mx import MX_DEVICES, MXLinearScheme
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows


@register_scheme("W8A8_MXFP8", "moe")
class AscendW8A8MXFP8MoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank, all as views of contiguous tensors [E, out, ...]: what the linear scheme has,
    with a leading axis.
    """

    granularity = ("blocks of 32",)
    checked_against: ClassVar[dict[str, tuple[str, ...]]] = {"W8A8_MXFP8": ("qwen3-moe/W8A8_MXFP8",)}
    supported_devices = MX_DEVICES
    linear: ClassVar[type[MXLinearScheme]] = AscendW8A8MXFP8LinearMethod
    weight_scale: ClassVar[str] = "scale"

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """An exponent for each block."""
        linear = self.halves[half]
        assert isinstance(linear, MXLinearScheme)
        return linear.quantize_tokens(x)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        linear = self.halves[half]
        assert isinstance(linear, MXLinearScheme)
        return grouped(
            layer,
            half,
            rows,
            **{self.weight_scale: "weight_scale"},
            x_dtype=FLOAT4_E2M1 if linear.quantisation["dst_type"] == FLOAT4_E2M1 else None,
            weight_dtype=FLOAT4_E2M1 if linear.storage.fp4 else None,
            scale_dtype=FLOAT8_E8M0,
            per_token_scale_dtype=FLOAT8_E8M0,
            output_dtype=dtype,
        )
