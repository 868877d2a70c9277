"""W4A8_DYNAMIC: int4 weights with scales in one or two stages, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import Param, finite, float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, packed_at_run_time, process_int4_weight
from quant_core.storage import tensors_of
from quant_core.storage.base import expanded
from quant_core.stored import ActivationForm, WeightForm

_PACKED = ("910B", "910C")

# What the operator takes: input features of a group, and fewer than so many of all.
_GROUP = 256
_MOST_INPUTS = 29576


@register_scheme("W4A8_DYNAMIC", "linear")
class AscendW4A8DynamicLinearMethod(AscendW8A8DynamicLinearMethod):
    """y = (a (q - weight_offset)ᵀ) · x_scale · s + bias, a = rint(x / x_scale), x_scale = max|x| / 127 per token.

    Inputs may be asymmetric, as W8A8_DYNAMIC has them.

    Stored beside the weight:
        scale_bias: float [out, parts], a sum of 8 q · s over equal parts of the input features, where there is one

    Run time, where the operator can take it (16-bit models, out a multiple of 8, in and its groups of 256, no zero
    points):
        weight: int32 [in, out / 8], half a byte per value
        weight_scale: int64 [in / 256, out], encoded
        scale_bias: float32 [out], 8 Σ q · s of this rank's input features
    elsewhere, and on CPU, what W8A8_DYNAMIC has.
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {
        "W4A8_DYNAMIC": (
            "qwen3/W4A8_DYNAMIC",
            "qwen3/V0_W4A8_DYNAMIC_GROUP64",
            "llmcompressor/qwen3/W4A8_CHANNEL",
            "llmcompressor/qwen3/W4A8_GROUP",
            "llmcompressor/qwen3/W4A8_PACKED",
        )
    }
    stores = WeightForm(num_bits=4)
    activation = ActivationForm()
    _packed: bool

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Scales and offsets, and `scale_bias`, in as many parts as the writer chose."""
        params, form = super().get_pergroup_param(input_size, output_size, params_dtype), self.context.form
        if form.has("scale_bias", default=True):
            shape = form.shape("scale_bias", ())
            parts = shape[1] if len(shape) == 2 else 1
            # Of parts that cannot be cut every rank keeps all: they are dropped after loading.
            ranks = self.context.partition.input_parts
            cut = ranks > 1 and parts % ranks == 0
            params["scale_bias"] = Param(
                (output_size, parts),
                form.float_dtype("scale_bias"),
                output_dim=0,
                input_dim=1 if cut else None,
                check=finite,
                dummy=0.0,
            )
        return params

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Multiply the scales of both stages, bring everything into the operator's form, drop the offsets.

        `scale_bias` is computed again: it has to cancel to the last bit, for the rounded scales that the operator takes
        and for the input features of this rank; what older writers store is off by up to 0.3 %.
        """
        stored = tensors_of(layer)
        codes, scale = self.storage.codes(stored), self.storage.scale(stored)
        self._packed = self._operator_takes(codes.shape[1], scale.shape[1])
        if not self._packed:
            super().process_weights_after_loading(layer)
            drop(layer, "scale_bias")
            return
        process_int4_weight(layer, codes, packed=True)
        drop(layer, "weight_offset", "weight_channel_scale", "weight_channel_offset")
        scale = scale.repeat_interleave(codes.shape[1] // _GROUP // scale.shape[1], dim=1).t().contiguous()
        encoded = torch.ops.npu.npu_trans_quant_param(scale.flatten(), round_mode=1).view(scale.shape)
        sums = codes.unflatten(1, (-1, _GROUP)).sum(dim=-1, dtype=torch.int32)
        replace_parameter(layer, "weight_scale", encoded)
        replace_parameter(layer, "scale_bias", 8 * (sums.t() * float_values(encoded)).sum(dim=0))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        if not self._packed:
            return super().apply(layer, x, bias, tp_rank)
        codes, x_scale = self.quantize_tokens(x.reshape(-1, x.shape[-1]))
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            codes,
            tensor_of(layer, "weight"),
            tensor_of(layer, "weight_scale"),
            offset=tensor_of(layer, "scale_bias"),
            pertoken_scale=x_scale[:, None],
            output_dtype=x.dtype,
            group_sizes=[0, 0, _GROUP],
        )
        y = y if bias is None else y + bias.to(y.dtype)  # the operator takes none
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As all int4 weights, and the sums of `scale_bias`."""
        stored, form = self.storage.quantize(weight), self.context.form
        if form.has("scale_bias", default=True):
            parts = form.shape("scale_bias", (0, 1))[1]
            values = 8 * self.storage.codes(stored) * expanded(self.storage.scale(stored), weight.shape[1])
            stored["scale_bias"] = values.unflatten(1, (parts, -1)).sum(dim=-1)
        return stored

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int4_weight(layer, codes, packed=False)

    def _operator_takes(self, inputs: int, groups: int) -> bool:
        context = self.context
        return (
            packed_at_run_time(context, _PACKED)
            and not self.corrects
            and context.params_dtype != torch.float32
            and context.form.has("scale_bias", default=True)  # or a reload would wait for weights of it
            and inputs % (_GROUP * groups) == 0
            and inputs < _MOST_INPUTS
        )
