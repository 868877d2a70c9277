"""W8A8_DYNAMIC: int8 weights with one scale per output channel, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.int8 import int8_codes, int8_weight, symmetric_scale, transpose_weight
from quant_core.schemes.params import Param, float_values, positive, replace_parameter, tensor_of, zero
from quant_core.schemes.registry import register_scheme


@register_scheme("W8A8_DYNAMIC", "linear")
class AscendW8A8DynamicLinearMethod(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 127 per token.

    Stored:
        weight: int8 [out, in]
        weight_scale: float [out, 1]
        weight_offset: float [out, 1], zero

    Run time:
        weight: int8 [in, out]
        weight_scale: float32 [out]
    """

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Per-channel scales only: no operator multiplies int8 activations by int8 weights in groups."""
        reasons = super().can_serve(context)
        shape = context.form.shape("weight_scale", (1, 1))
        if len(shape) == 2 and shape[1] != 1:
            reasons.append(f"weight_scale is {list(shape)}: W8A8_DYNAMIC has one scale per channel here, not per group")
        return reasons

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int8_weight(input_size, output_size)

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight_scale` and `weight_offset`."""
        form = self.context.form
        shape, dtype = (output_size, 1), form.float_dtype("weight_scale")
        params = {"weight_scale": Param(shape, dtype, output_dim=0, check=positive, dummy=1.0)}
        if form.has("weight_offset", default=True):
            dtype = form.float_dtype("weight_offset")
            params["weight_offset"] = Param(shape, dtype, output_dim=0, check=zero, dummy=0.0)
        return params

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose the weight, flatten the scale, drop the offset, which is zero."""
        transpose_weight(layer)
        replace_parameter(layer, "weight_scale", float_values(layer.get_parameter("weight_scale").data).flatten())
        if hasattr(layer, "weight_offset"):
            del layer.weight_offset

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        codes, x_scale = self._quantise(x.reshape(-1, x.shape[-1]))
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            codes,
            tensor_of(layer, "weight"),
            tensor_of(layer, "weight_scale"),
            pertoken_scale=x_scale,
            bias=bias,
            output_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def _quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        max_over_ranks = self.context.partition.max_over_ranks
        if max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows)
            return codes, scale
        # Each rank holds a slice of every token, and all must use the scale of the whole token. The smallest positive
        # scale keeps a zero token from being divided by zero.
        peak = max_over_ranks(rows.abs().amax(dim=-1).to(torch.float32))
        scale = (peak / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Weight times scale."""
        return layer.get_parameter("weight").to(torch.float32) * float_values(layer.get_parameter("weight_scale"))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel becomes 127."""
        scale = symmetric_scale(weight)
        return {"weight": int8_codes(weight, scale), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
