"""WFP8AFP8: FP8 weights with one scale per channel or tensor, activations quantised with a scale from calibration."""

import functools

import torch
from torch import Tensor, nn

from quant_core.schemes.fp8 import FP8LinearScheme, fp8_codes, fp8_multiply
from quant_core.schemes.params import Param, positive, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.static_inputs import InputRuns, part
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("WFP8AFP8", "linear")
class AscendWFP8AFP8LinearMethod(FP8LinearScheme):
    """y = (a qᵀ) · input_scale · weight_scale + bias, a = E4M3(clamp(x / input_scale, -448, 448)).

    Stored beside the weight:
        input_scale: float () or [1]

    Run time, beside what all FP8 types have, with g runs of members that share an input scale (1, where calibration
    saw q, k and v together; one for each member, where the values come later):
        input_scale: float32 [g]
    """

    checked_against = {"WFP8AFP8": ("llmcompressor/qwen3/FP8_STATIC",)}
    stores = WeightForm(type="float")
    activation = ActivationForm(type="float", dynamic=False, strategy="tensor")

    @functools.cached_property
    def _runs(self) -> InputRuns:
        return InputRuns(self.context)

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """`input_scale`, in the dtype it is stored in."""
        form, name = self.context.form, "input_scale"
        return {name: Param(form.single(name), form.float_dtype(name), check=positive, dummy=1.0)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As all FP8 types, and merge equal input scales."""
        super().process_weights_after_loading(layer)
        self._runs.merge(layer, "input_scale")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """One product for each distinct input scale."""
        rows, scale = x.reshape(-1, x.shape[-1]), tensor_of(layer, "input_scale")

        def multiply(run: slice | None, features: slice | None) -> Tensor:
            one = part(scale, run)
            return fp8_multiply(layer, fp8_codes(rows, one), one.repeat(len(rows)), bias, x.dtype, features)

        y = self._runs.product(multiply)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Refused: which scale the input takes is found by calibration only."""
        raise NotImplementedError(f"{type(self).__name__} needs calibration and cannot quantise by itself")
