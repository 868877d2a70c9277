"""W4A8_DYNAMIC experts: int4 weights with scales in one or two stages, activations quantised per token at run time."""

import torch
from torch import Tensor, nn

from quant_core.devices import current_device
from quant_core.packing import pack_eights
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import ExpertsContext, LayerContext
from quant_core.schemes.experts import grouped
from quant_core.schemes.linear.w4a8_dynamic import AscendW4A8DynamicLinearMethod
from quant_core.schemes.moe.w8a8_dynamic import AscendW8A8DynamicMoEMethod
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Rows
from quant_core.schemes.run_time import drop, process_int4_weight
from quant_core.storage import tensors_of

#: Products whose operator multiplies int8 by packed int4, by groups of so many input features or per channel.
_PACKED = ("910B", "910C")
_GROUP = 256


@register_scheme("W4A8_DYNAMIC", "moe")
class AscendW4A8DynamicMoEMethod(AscendW8A8DynamicMoEMethod):
    """Each product as in a linear layer of this type.

    Run time on 910B and 910C, of E experts on this rank, with g groups of 256 input features (1: per channel):
        w13_weight, w2_weight: int32 [E, in, out / 8], half a byte per value
        w13_weight_scale, w2_weight_scale: int64 [E, g, out], a float32 in the low half of each
        w13_scale_bias, w2_scale_bias: float32 [E, out], 8 Σ q · s of this rank's input features, which the operator
            adds because it multiplies x - 8
    on CPU, and where there are zero points, what W8A8_DYNAMIC has.
    """

    granularity = ("per channel", "per group", "per tensor")
    checked_against = {
        "W4A8_DYNAMIC": (
            "qwen3-moe/W4A8_DYNAMIC",
            "qwen3-moe/V0_W4A8_DYNAMIC_GROUP64",
            "deepseek-v3/W4A8_DYNAMIC",
            "llmcompressor/qwen3-moe/W4A8_CHANNEL",
        )
    }
    supported_devices = (*_PACKED, "cpu")
    linear = AscendW4A8DynamicLinearMethod

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """As all experts, and what the operator of an NPU takes."""
        reasons = super().can_serve(context)
        if reasons or current_device() not in _PACKED:
            return reasons
        assert isinstance(context, ExpertsContext)
        for half in context.halves.values():
            weight = half.form.weight
            if weight is not None and weight.strategy == "group" and (weight.group_size or 0) % _GROUP:
                reasons.append(
                    f"groups of {weight.group_size}, where this device's operator takes multiples of {_GROUP}"
                )
            if any(shard.local_output_size % 8 for shard in half.shards):
                reasons.append("output features that are no multiple of 8 on each rank")
        return reasons

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """Multiply the scales of both stages, and compute `scale_bias` again for this rank and these scales."""
        assert isinstance(linear, AscendW4A8DynamicLinearMethod)
        if linear.corrects:
            super().process_one(linear, module)
            return
        stored = tensors_of(module)
        codes, scale = linear.storage.codes(stored), linear.storage.scale(stored)
        packed = current_device() in _PACKED
        drop(module, *(name for name in stored if name not in ("weight", "weight_scale")))
        if not packed:
            process_int4_weight(module, codes, packed=False)
            replace_parameter(module, "weight_scale", scale[:, 0] if scale.shape[1] == 1 else scale.t().contiguous())
            return
        sums = codes.unflatten(1, (scale.shape[1], -1)).sum(dim=-1, dtype=torch.int32)
        bits = scale.t().contiguous().view(torch.int32).to(torch.int64)
        replace_parameter(module, "weight", pack_eights(codes.t()))
        replace_parameter(module, "weight_scale", bits & 0xFFFFFFFF)
        replace_parameter(module, "scale_bias", 8 * (sums * scale).sum(dim=1))

    def multiply_plainly(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator."""
        bias = "scale_bias" if hasattr(layer, f"{half}scale_bias") else None
        return grouped(layer, half, rows, scale="weight_scale", bias=bias, output_dtype=dtype)
