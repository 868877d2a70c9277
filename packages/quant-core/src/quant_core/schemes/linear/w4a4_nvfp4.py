"""W4A4_NVFP4: FP4 weights and activations in groups of 16 with E4M3 scales, below one stored scale for each of both."""

import functools

import torch
from torch import Tensor, nn

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.linear.w4a16_nvfp4 import NVFP4
from quant_core.schemes.params import Param, positive, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.static_inputs import InputRuns, part
from quant_core.storage.nvfp4 import GROUP
from quant_core.stored import ActivationForm

#: The stored scale of a layer's input.
INPUT_SCALE = "input_global_scale"


@register_scheme("W4A4_NVFP4", "linear")
class AscendW4A4NVFP4LinearMethod(DequantisedLinearScheme):
    """y = (a · s) (q · weight_scale / weight_global_scale)ᵀ / input_global_scale + bias.

    s = E4M3(input_global_scale · max|x| / 6) per token and group of 16, a = E2M1(x · input_global_scale / s).

    Stored beside the weight:
        input_global_scale: float32 () or [1]

    Run time, with g runs of members that share an input scale (1, where calibration saw q, k and v together; one for
    each member, where the values come later):
        weight: model dtype [out, in]
        input_global_scale: float32 [g]
    """

    granularity = ("groups of 16",)
    checked_against = {"W4A4_NVFP4": ("llmcompressor/qwen3/NVFP4",)}
    stores = NVFP4
    activation = ActivationForm(
        num_bits=4,
        type="float",
        strategy="group",
        group_size=GROUP,
        scale_dtype=torch.float8_e4m3fn,
        outer="tensor",
    )
    strategies = ("group",)
    kept = (INPUT_SCALE,)

    @functools.cached_property
    def _runs(self) -> InputRuns:
        return InputRuns(self.context)

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight_global_scale` and `input_global_scale`."""
        form = self.context.form
        own = Param(form.single(INPUT_SCALE), form.float_dtype(INPUT_SCALE), check=positive, dummy=1.0)
        return super().get_pertensor_param(params_dtype) | {INPUT_SCALE: own}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Dequantise the weight, merge equal input scales."""
        super().process_weights_after_loading(layer)
        self._runs.merge(layer, INPUT_SCALE)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """One plain product for each distinct input scale."""
        rows, weight, scale = x.reshape(-1, x.shape[-1]), tensor_of(layer, "weight"), tensor_of(layer, INPUT_SCALE)

        def multiply(run: slice | None, features: slice | None) -> Tensor:
            own = None if bias is None else part(bias, features)
            return self.multiply(rows, part(weight, features), own, part(scale, run).squeeze(0))

        y = self._runs.product(multiply)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Refused: the scale of the input is found by calibration only."""
        raise NotImplementedError(f"{type(self).__name__} needs calibration and cannot quantise by itself")
