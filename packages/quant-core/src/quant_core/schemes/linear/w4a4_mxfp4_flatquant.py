"""W4A4_MXFP4_FLATQUANT: FP4 weights, and FP4 activations in blocks of 32 after FlatQuant's transform."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_core.ops.dtypes import FLOAT4_E2M1
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.flatquant import (
    identity_transform,
    matrices_of,
    process_transform,
    transform_params,
    transform_reasons,
    transform_sizes,
    turned_back,
)
from quant_core.schemes.mx import MXFP4, TO_FP4, TOKENS_MXFP4, MXLinearScheme, mx_multiply
from quant_core.schemes.params import Param, tensor_of
from quant_core.schemes.registry import register_scheme

#: What the operator's matrices have at most.
_LARGEST = 256


@register_scheme("W4A4_MXFP4_FLATQUANT", "linear")
class AscendW4A4MXFP4FlatQuantLinearMethod(MXLinearScheme):
    """W4A4_MXFP4 of X' = left_transᵀ · X · right_trans, with x as X [L, R]; here ties go to even.

    Stored beside the weight, with L · R = in:
        left_trans: float [L, L]
        right_trans: float [R, R], absent where it is the identity
        clip_ratio: float [1], without effect: the operator clips nothing for FP4

    Run time:
        weight: uint8 [in / 2, out], a view of what is stored; on CPU: int8 [in, out] with twice the values, one byte
            each, likewise a view of [out, in]
        weight_scale: uint8 [ceil(in / 64), out, 2], a view of [out, ...]
        left_trans: model dtype [L, L], transposed
        right_trans: model dtype [R, R]
    """

    granularity = ("blocks of 32",)
    checked_against = {"W4A4_MXFP4_FLATQUANT": ("qwen3/W4A4_MXFP4_FLATQUANT",)}
    stores = MXFP4
    activation = replace(TOKENS_MXFP4, ties="even")
    quantisation = TO_FP4

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Sizes that FP4 and the transform allow, and no rotation across tensor-parallel ranks."""
        assert isinstance(context, LinearContext)
        unfit = transform_reasons(context)
        if not unfit and (max(transform_sizes(context)) > _LARGEST or transform_sizes(context)[1] % 2):
            unfit = [f"the operator takes sizes of up to {_LARGEST}, the second even, not {transform_sizes(context)}"]
        return super().can_serve(context) + unfit

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """`left_trans`, `right_trans` and `clip_ratio`."""
        return transform_params(self.context)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As for all of MX, and transpose left_trans; drop the clip ratio."""
        super().process_weights_after_loading(layer)
        process_transform(layer, self.context)
        del layer.clip_ratio

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: transform and quantise, multiply.

        Raises:
            LimitError: if the layer's matrices do not transform so many features.

        """
        tokens, left, right = matrices_of(layer, x)
        codes, x_scale = torch.ops.npu.npu_kronecker_quant(tokens, left, right, dst_dtype=FLOAT4_E2M1)
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        form = {"output_dtype": x.dtype, "group_sizes": self.group_sizes}
        y = mx_multiply(codes, x_scale, weight, scale, bias, (True, True), **form)
        return y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Elements times their block's power of two, turned back."""
        return turned_back(layer, super().dequantize(layer))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As W4A4_MXFP4; without calibration the transform is the identity."""
        return super().quantize(weight) | identity_transform(self.context)
