"""W8A8_DYNAMIC: int8 weights, activations quantised per token at run time."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight, sum_of_groups, sums_of_weight
from quant_core.schemes.tokens import asymmetric_codes, token_scale
from quant_core.storage import IntegerStorage, tensors_of
from quant_core.storage.base import Tensors
from quant_core.stored import ActivationForm, WeightForm


@register_scheme("W8A8_DYNAMIC", "linear")
@register_scheme("W8A8_SVD_DYNAMIC", "linear")
class AscendW8A8DynamicLinearMethod(AscendLinearScheme):
    """y = (a (q - weight_offset)ᵀ) · x_scale · weight_scale + bias, a = rint(x / x_scale), x_scale = max|x| / 127.

    Asymmetric inputs, if a format states them: x_scale = (max x - min x) / 255, a = rint(x / x_scale + x_offset) -
    x_offset, where x_offset = 127 - max x / x_scale. Both are of each token.

    Run time, with g groups of input features (1: per channel or tensor):
        weight: int8 [in, out]
        weight_scale: float32 [out], or [g, out]
        weight_offset: int32 as the scale (float32 if zero points are no integers), of asymmetric weights
        weight_sum: float32 [out], Σ (q - weight_offset) · weight_scale of this rank's input features, for asymmetric
            inputs
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {
        "W8A8_DYNAMIC": (
            "qwen3/W8A8_DYNAMIC_SHARDED",
            "qwen2/W8A8_DYNAMIC",
            "qwen3/W4A4_DYNAMIC_LAOS_ONLINE",
            "qwen3/MIXED_LAYERS",
        ),
    }
    stores = WeightForm()
    activation = ActivationForm()
    strategies = ("channel", "group", "tensor")
    takes_offsets = True
    storage: IntegerStorage

    @classmethod
    def takes_input(cls, form: ActivationForm) -> bool:
        """Symmetric or not; the operators have no int4 with a zero point."""
        return replace(form, symmetric=True) == cls.activation and (form.symmetric or form.num_bits == 8)

    @property
    def asymmetric_input(self) -> bool:
        """Whether tokens are quantised with a zero point."""
        stated = self.context.form.input
        return stated is not None and stated.dynamic and not stated.symmetric

    @property
    def corrects(self) -> bool:
        """Whether there are zero points, which the operators know nothing of: they give sums, completed afterwards."""
        return self.asymmetric_input or not self.storage.weight.symmetric

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose weight, scale and offset; drop the offset of a symmetric type, which is zero."""
        stored = tensors_of(layer)
        codes, scale, offset = self.storage.codes(stored), self.storage.scale(stored), self._offset(stored)
        self._process_weight(layer, codes)
        replace_parameter(layer, "weight_scale", _transposed(scale))
        drop(layer, "weight_offset", "weight_channel_scale", "weight_channel_offset")
        if offset is not None:
            replace_parameter(layer, "weight_offset", _transposed(offset))
        if self.asymmetric_input:
            replace_parameter(layer, "weight_sum", sums_of_weight(codes, scale, offset))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply; per group one multiplication for each."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        if scale.dim() == 1 and not self.corrects:
            codes, x_scale = self.quantize_tokens(rows)
            y: Tensor = torch.ops.npu.npu_quant_matmul(
                codes, weight, scale, pertoken_scale=x_scale, bias=bias, output_dtype=x.dtype
            )
        else:
            y = self._completed(layer, rows)
            y = (y if bias is None else y + bias).to(x.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def _completed(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """The product with scales of groups and zero points, float32."""
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        offset: Tensor | None = getattr(layer, "weight_offset", None)
        if not self.asymmetric_input:
            codes, x_scale = self.quantize_tokens(rows)
            return sum_of_groups(codes, weight, scale, offset) * x_scale[:, None]
        codes, x_scale, x_offset = asymmetric_codes(rows, self.context.partition)
        y = sum_of_groups(codes, weight, scale, offset)
        return (y - x_offset[:, None] * tensor_of(layer, "weight_sum")) * x_scale[:, None]

    def _offset(self, stored: Tensors) -> Tensor | None:
        """The zero points of asymmetric weights [out, g], as integers if they are stored so."""
        offset = None if self.storage.weight.symmetric else self.storage.offset(stored)
        if offset is None or stored["weight_offset"].dtype.is_floating_point:
            return offset
        return offset.to(torch.int32)

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int8_weight(layer, codes)

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of a symmetric input [tokens, in] and their scales [tokens]."""
        partition = self.context.partition
        if partition.max_over_ranks is None:
            codes, scale = torch.ops.npu.npu_dynamic_quant(rows)
            return codes, scale
        scale = token_scale(rows, 127, partition)
        return torch.ops.npu.npu_quantize(rows, scale, None, torch.qint8, 0, True), scale


def _transposed(values: Tensor) -> Tensor:
    """Values of groups [out, g] as [g, out]; of one group as [out]."""
    return values.flatten() if values.shape[1] == 1 else values.t().contiguous()
