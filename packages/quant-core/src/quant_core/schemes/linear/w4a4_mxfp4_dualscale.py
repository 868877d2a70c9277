"""W4A4_MXFP4_DUALSCALE: FP4 weights and activations with a float scale per group above the powers of two per 32."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_core import microscaling as mx
from quant_core.schemes.mx import MXFP4, TO_FP4, TOKENS_MXFP4, MXLinearScheme, mx_multiply, run_time_weight
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import FRACTAL_NZ

#: Input features of a group, where the operators that have both levels can be used.
_OPERATOR_GROUP = 512


@register_scheme("W4A4_MXFP4_DUALSCALE", "linear")
class AscendW4A4MXFP4DualScaleLinearMethod(MXLinearScheme):
    """y = Σ over groups of x_dual_scale · weight_dual_scale · (what W4A4_MXFP4 computes of the group), + bias.

    Activations are divided by x_dual_scale = max|x| / 6 per group and token, then quantised as in W4A4_MXFP4.

    Run time, with g groups of input features, for groups of 512, and for one group of fewer:
        weight: int8 [out, in / 2], in the device's layout; on CPU: int8 [out, in] with twice the values, one byte each
        weight_scale: uint8 [out, ceil(in / 64), 2]
        weight_dual_scale: float32 [g, out]
    for other groups, of which no operator knows, one product for each of them:
        weight: uint8 [g, out, in / g / 2]; on CPU: int8 [g, out, in / g] with twice the values, one byte each
        weight_scale: uint8 [g, out, in / g / 64, 2]
        weight_dual_scale: float32 [g, out]
    """

    granularity = ("blocks of 32 and 512",)
    checked_against = {"W4A4_MXFP4_DUALSCALE": ("qwen3/W4A4_MXFP4_DUALSCALE",)}
    stores = replace(MXFP4, outer="group", outer_group_size=_OPERATOR_GROUP)
    activation = TOKENS_MXFP4
    quantisation = TO_FP4

    @property
    def _one_operator(self) -> bool:
        groups = self.storage.outer_groups(self.context.input_size)
        length = self.context.input_size // groups
        return length == _OPERATOR_GROUP or (groups == 1 and length < _OPERATOR_GROUP)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring weight and scales into the form that the operators take."""
        weight, scale, dual = (
            layer.get_parameter(name).data for name in ("weight", "weight_scale", "weight_dual_scale")
        )
        weight = run_time_weight(weight)
        factors = dual.squeeze(-1).t().contiguous().to(torch.float32)
        if self._one_operator:
            weight = torch.ops.npu.npu_format_cast(weight.view(torch.int8), FRACTAL_NZ)
            scale = mx.pair_exponents(scale)
        else:
            groups = factors.shape[0]
            weight = weight.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
            scale = scale.unflatten(1, (groups, -1, 2)).transpose(0, 1).contiguous()
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, "weight_scale", scale)
        replace_parameter(layer, "weight_dual_scale", factors)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators, or two and one more for each group."""
        rows = x.reshape(-1, x.shape[-1])
        added = None if bias is None else bias.to(torch.float32)
        if not self._one_operator:
            y = self._sum_of_groups(layer, rows)
            y = (y if added is None else y + added).to(x.dtype)
            return y.view(*x.shape[:-1], y.shape[-1])
        codes, level0, level1 = torch.ops.npu.npu_dynamic_dual_level_mx_quant(rows, round_mode=self.round_mode)
        weight, scale, factors = (tensor_of(layer, n) for n in ("weight", "weight_scale", "weight_dual_scale"))
        result: Tensor = torch.ops.npu.npu_dual_level_quant_matmul(
            codes, weight, level0, factors, level1, scale, bias=added, output_dtype=x.dtype
        )
        return result.view(*x.shape[:-1], result.shape[-1])

    def _sum_of_groups(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """Float32 [m, n], without bias."""
        weight, scale, factors = (tensor_of(layer, n) for n in ("weight", "weight_scale", "weight_dual_scale"))
        parts = rows.unflatten(1, (weight.shape[0], -1)).to(torch.float32)
        # The smallest positive scale keeps zeros from being divided by zero.
        level0 = (parts.abs().amax(-1) / mx.E2M1_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        quotients = (parts / level0[..., None]).to(rows.dtype)
        total = torch.zeros(rows.shape[0], weight.shape[1], dtype=torch.float32, device=rows.device)
        for group in range(weight.shape[0]):
            codes, level1 = torch.ops.npu.npu_dynamic_mx_quant(
                quotients[:, group].contiguous(), round_mode=self.round_mode, **self.quantisation
            )
            y = mx_multiply(
                codes,
                level1,
                weight[group].t(),
                scale[group].transpose(0, 1),
                None,
                (True, True),
                output_dtype=torch.float32,
                group_sizes=self.group_sizes,
            )
            total = total + y * level0[:, group, None] * factors[group]
        return total
