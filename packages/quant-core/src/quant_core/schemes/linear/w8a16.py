"""W8A16: int8 weights, multiplied with activations in the model's dtype."""

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight
from quant_core.storage import IntegerStorage, tensors_of
from quant_core.stored import WeightForm


@register_scheme("W8A16", "linear")
class AscendW8A16LinearMethod(AscendLinearScheme):
    """y = x ((q - weight_offset) · weight_scale)ᵀ + bias.

    Run time, with g groups of input features (1: per channel or tensor):
        weight: int8 [in, out]
        weight_scale: model dtype [g, out]
        weight_offset: model dtype [g, out], negated, since the operator adds it
        weight_g_idx: int32 [in], of groups that are not made of neighbours: the input feature of each row of `weight`,
            whose rows are in the order of their groups
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {"W8A16": ("qwen3/W8A16_ASYM", "qwen3/W8A16_GROUP64", "qwen3/MIXED_LAYERS")}
    stores = WeightForm(symmetric=False)
    strategies = ("channel", "group", "tensor")
    takes_index = True
    storage: IntegerStorage

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """As all linear types; groups of any input features are not cut over ranks, nor multiplied for experts."""
        assert isinstance(context, LinearContext)
        reasons, weight = super().can_serve(context), context.form.weight
        if weight is None or not weight.indexed:
            return reasons
        unserved = {
            f"a layer whose input features are cut over {context.partition.input_parts} ranks": (
                context.partition.input_parts > 1
            ),
            "experts": bool(context.stack),
        }
        todo = "quantise with `actorder: static` (or `weight`), which keeps the order in which features are stored"
        return reasons + [
            f"groups that are not made of neighbours (weight_g_idx) are not served for {what}: {todo}"
            for what, wrong in unserved.items()
            if wrong
        ]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose everything; the operator wants scale and offset in the model's dtype, and groups of neighbours."""
        stored, dtype = tensors_of(layer), self.context.params_dtype
        codes, scale, offset = self.storage.codes(stored), self.storage.scale(stored), self.storage.offset(stored)
        order = self.storage.order(stored)
        if order is not None:
            codes = codes[:, order]
            replace_parameter(layer, "weight_g_idx", order.to(torch.int32))
        self._process_weight(layer, codes)
        drop(layer, "weight_channel_scale", "weight_channel_offset")
        replace_parameter(layer, "weight_scale", scale.t().contiguous().to(dtype))
        if offset is not None:
            replace_parameter(layer, "weight_offset", (-offset).t().contiguous().to(dtype))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """One operator, after its input is put in the order of the groups, if these are not made of neighbours."""
        rows = x.reshape(-1, x.shape[-1])
        if self.storage.weight.indexed:
            rows = rows.index_select(1, tensor_of(layer, "weight_g_idx"))
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        groups = scale.shape[0]
        if bias is not None and x.dtype == torch.bfloat16:
            bias = bias.to(torch.float32)  # the operator's rule for bfloat16
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            rows,
            weight,
            scale,
            getattr(layer, "weight_offset", None),
            bias=bias,
            antiquant_group_size=x.shape[-1] // groups if groups > 1 else 0,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def _process_weight(self, layer: nn.Module, codes: Tensor) -> None:
        process_int8_weight(layer, codes)
