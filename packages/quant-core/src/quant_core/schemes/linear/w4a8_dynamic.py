"""W4A8_DYNAMIC: int4 weights with scales in one or two stages, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.packing import pack_pairs
from quant_core.schemes.context import LayerContext
from quant_core.schemes.groups import groups_of, scale_params, unequal_groups
from quant_core.schemes.int4 import int4_codes, int4_weight, packed_along_out, packed_at_run_time, process_int4_weight
from quant_core.schemes.int8 import symmetric
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import Param, finite, float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme

_PACKED = ("910B", "910C")

# What the operator takes: input features of a group, and fewer than so many of all.
_GROUP = 256
_MOST_INPUTS = 29576


@register_scheme("W4A8_DYNAMIC", "linear")
class AscendW4A8DynamicLinearMethod(AscendW8A8DynamicLinearMethod):
    """y = (a qᵀ) · x_scale · s + bias, a = rint(x / x_scale), x_scale = max|x| / 127 per token.

    Stored, in one stage (s = weight_scale) or in two (s = weight_scale · weight_scale_second), g groups:
        weight: int8 [out / 2, in], two values to a byte, or by older writers one [out, in]
        weight_scale, weight_offset: float [out, 1]; offsets are zero
        weight_scale_second: float [out, g]
        weight_offset_second: int64 [out, g], zero
        scale_bias: float [out, 1], [out, 16] or [out, in]: parts of 8 Σ q · s over the input features

    Run time, where the operator can take it (16-bit models, out a multiple of 8, in and its groups of 256):
        weight: int32 [in, out / 8], half a byte per value
        weight_scale: int64 [in / 256, out], encoded
        scale_bias: float32 [out], 8 Σ q · s of this rank's input features
    elsewhere, and on CPU, what W8A8_DYNAMIC has:
        weight: int8 [in, out]
        weight_scale: float32 [out], or [g, out]
    """

    granularity = ("per channel", "per group")
    checked_against = {"W4A8_DYNAMIC": ("qwen3/W4A8_DYNAMIC", "qwen3/V0_W4A8_DYNAMIC_GROUP64")}
    _packed: bool

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Whole groups only."""
        return super().can_serve(context) + unequal_groups(context, "weight_scale_second")

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return int4_weight(input_size, output_size, self._axis(output_size))

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Scales and offsets of both stages, and `scale_bias`."""
        form = self.context.form
        params = super().get_pergroup_param(input_size, output_size, params_dtype)
        if form.has("weight_scale_second"):
            groups = groups_of(self.context, "weight_scale_second")
            params |= scale_params(form, input_size, output_size, groups, "_second")
        if form.has("scale_bias", default=True):
            parts = groups_of(self.context, "scale_bias")
            params["scale_bias"] = Param(
                (output_size, parts),
                form.float_dtype("scale_bias"),
                output_dim=0,
                input_dim=1 if parts == input_size else None,  # 16 parts are few, and need not be cut
                check=finite,
                dummy=0.0,
            )
        return params

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Multiply the scales of both stages, bring everything into the operator's form, drop the offsets.

        `scale_bias` is computed again: it has to cancel to the last bit, for the rounded scales that the operator takes
        and for the input features of this rank; what older writers store is off by up to 0.3 %.
        """
        codes, scale = int4_codes(layer, self._axis(self.context.output_size)), self._scale(layer)
        self._packed = self._operator_takes(codes.shape[1], scale.shape[1])
        process_int4_weight(layer, codes, self._packed)
        for name in ("weight_offset", "weight_scale_second", "weight_offset_second"):
            if hasattr(layer, name):
                delattr(layer, name)
        if self._packed:
            scale = scale.repeat_interleave(codes.shape[1] // _GROUP // scale.shape[1], dim=1).t().contiguous()
            encoded = torch.ops.npu.npu_trans_quant_param(scale.flatten(), round_mode=1).view(scale.shape)
            sums = codes.unflatten(1, (-1, _GROUP)).sum(dim=-1, dtype=torch.int32)
            replace_parameter(layer, "weight_scale", encoded)
            replace_parameter(layer, "scale_bias", 8 * (sums.t() * float_values(encoded)).sum(dim=0))
            return
        replace_parameter(layer, "weight_scale", scale.flatten() if scale.shape[1] == 1 else scale.t().contiguous())
        if hasattr(layer, "scale_bias"):
            del layer.scale_bias

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        if not self._packed:
            return super().apply(layer, x, bias, tp_rank)
        codes, x_scale = self._quantise(x.reshape(-1, x.shape[-1]))
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

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Weight times the scales of both stages, group by group."""
        codes, scale = int4_codes(layer, self._axis(self.context.output_size)), self._scale(layer)
        return codes.to(torch.float32) * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the largest magnitude of a channel or group becomes 7. In two stages, the first is the largest
        scale among a channel's groups.
        """
        form = self.context.form
        groups = groups_of(self.context, "weight_scale_second") if form.has("weight_scale_second") else 1
        stored = symmetric(weight, groups, 7)
        codes, scale = stored["weight"], stored["weight_scale"]
        if form.has("weight_scale_second"):
            first = scale.amax(dim=1, keepdim=True)
            stored |= {
                "weight_scale": first,
                "weight_offset": torch.zeros_like(first),
                "weight_scale_second": scale / first,
                "weight_offset_second": torch.zeros(scale.shape, dtype=torch.int64),
            }
        parts = 8 * codes * scale.repeat_interleave(weight.shape[1] // groups, dim=1)
        if form.has("scale_bias", default=True):
            columns = groups_of(self.context, "scale_bias")
            stored["scale_bias"] = parts.unflatten(1, (columns, -1)).sum(dim=-1)
        axis = self._axis(weight.shape[0])
        return stored if axis is None else {**stored, "weight": pack_pairs(codes, axis)}

    def _axis(self, output_size: int) -> int | None:
        """Packed along the output features, or not at all; the shapes tell."""
        form = self.context.form
        return 0 if (packed_along_out(form) if form else output_size % 2 == 0) else None

    def _scale(self, layer: nn.Module) -> Tensor:
        """s [out, g], float32, from the stored scales."""
        scale = float_values(layer.get_parameter("weight_scale").data)
        if self.context.form.has("weight_scale_second"):
            scale = scale * float_values(layer.get_parameter("weight_scale_second").data)
        return scale

    def _operator_takes(self, inputs: int, groups: int) -> bool:
        context = self.context
        return (
            packed_at_run_time(context, _PACKED)
            and context.params_dtype != torch.float32
            and context.form.has("scale_bias", default=True)  # or a reload would wait for weights of it
            and inputs % (_GROUP * groups) == 0
            and inputs < _MOST_INPUTS
        )
