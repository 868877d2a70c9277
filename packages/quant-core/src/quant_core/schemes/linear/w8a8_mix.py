"""W8A8_MIX: one weight with the tensors of W8A8 and of W8A8_DYNAMIC, for prefill and decode on different instances."""

from typing import Self

from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import Param
from quant_core.schemes.registry import register_scheme
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("W8A8_MIX", "linear")
class AscendW8A8MixLinearMethod(AscendLinearScheme):
    """Static on an instance that only decodes, dynamic elsewhere: prefill gains most from scales per token.

    Run time: what the one of both types keeps that serves here.
    """

    granularity = ("per channel",)
    stores = WeightForm()
    activation = ActivationForm(dynamic=False, strategy="tensor", symmetric=False, folded=True)

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

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """Those of both types; what only W8A8_DYNAMIC needs is stored by all writers of this one."""
        return self._static.params(input_size, output_size) | self._dynamic.params(input_size, output_size)

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

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Only calibration finds what W8A8 stores."""
        return self._static.quantize(weight)
