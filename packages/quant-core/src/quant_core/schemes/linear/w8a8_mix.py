"""W8A8_MIX: one weight with the tensors of W8A8 and of W8A8_DYNAMIC, for prefill and decode on different instances."""

from typing import Self

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import Param
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A8_MIX", "linear")
class AscendW8A8MixLinearMethod(AscendLinearScheme):
    """Static on an instance that only decodes, dynamic elsewhere: prefill gains most from scales per token.

    Stored: what both types store.
    Run time: what the one of them keeps that serves here.
    """

    granularity = ("per channel",)

    @classmethod
    def create(cls, context: LayerContext) -> Self:
        """Both, of which the instance's role chooses one."""
        scheme = super().create(context)
        scheme._static = AscendW8A8LinearMethod.create(context)
        scheme._dynamic = AscendW8A8DynamicLinearMethod.create(context)
        return scheme

    _static: AscendW8A8LinearMethod
    _dynamic: AscendW8A8DynamicLinearMethod

    @property
    def _serving(self) -> AscendLinearScheme:
        return self._static if self.context.role == "decode" else self._dynamic

    @property
    def folds_bias(self) -> bool:  # type: ignore[override]
        """As the type that serves."""
        return self._serving.folds_bias

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`, of which there is one."""
        return self._dynamic.get_weight(input_size, output_size, params_dtype)

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """Those of W8A8."""
        return self._static.get_pertensor_param(params_dtype)

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Those of W8A8."""
        return self._static.get_perchannel_param(output_size, params_dtype)

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Those of W8A8_DYNAMIC, whose scales are per channel here."""
        return self._dynamic.get_pergroup_param(input_size, output_size, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Drop what the other type alone needs, then process as the one that serves."""
        own = self._serving.params(self.context.input_size, self.context.output_size)
        for name in [name for name in layer._parameters if name not in own and name != "bias"]:
            delattr(layer, name)
        self._serving.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """As the type that serves."""
        return self._serving.apply(layer, x, bias, tp_rank)

    def dequantize(self, layer: nn.Module) -> Tensor:
        """As W8A8_DYNAMIC."""
        return self._dynamic.dequantize(layer)
