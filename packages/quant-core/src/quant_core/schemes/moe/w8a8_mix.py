"""W8A8_MIX experts: one weight with the tensors of W8A8 and of W8A8_DYNAMIC, of which the instance's role chooses."""

from typing import Self

import torch
from torch import Tensor, nn

from quant_core.schemes.context import LayerContext
from quant_core.schemes.experts import AscendMoEScheme
from quant_core.schemes.linear.w8a8_mix import AscendW8A8MixLinearMethod
from quant_core.schemes.moe.w8a8 import AscendW8A8MoEMethod
from quant_core.schemes.moe.w8a8_dynamic import AscendW8A8DynamicMoEMethod
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows


@register_scheme("W8A8_MIX", "moe")
class AscendW8A8MixMoEMethod(AscendMoEScheme):
    """Static on an instance that only decodes, dynamic elsewhere, as linear layers of this type.

    Run time: what the one of both types keeps that serves here.
    """

    granularity = ("per channel",)
    linear = AscendW8A8MixLinearMethod
    _serving: AscendMoEScheme

    @classmethod
    def create(cls, context: LayerContext) -> Self:
        """Both declared, one serving."""
        scheme = super().create(context)
        scheme._serving = (AscendW8A8MoEMethod if context.role == "decode" else AscendW8A8DynamicMoEMethod).create(
            context
        )
        scheme.before_routing = scheme._serving.before_routing  # type: ignore[misc]
        return scheme

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """As the type that serves."""
        return self._serving.quantize_rows(layer, half, x, counts)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """As the type that serves."""
        return self._serving.multiply(layer, half, rows, dtype)
