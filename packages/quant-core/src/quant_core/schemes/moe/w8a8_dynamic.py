"""W8A8_DYNAMIC experts: int8 weights, activations quantised per token at run time."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_core.devices import current_device
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import DOWN, GATE_UP, ExpertsContext, LayerContext
from quant_core.schemes.experts import PACKED, AscendMoEScheme, grouped, weights_of
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.routing import Codes, Rows, experts_of
from quant_core.schemes.run_time import FRACTAL_NZ, pack_each
from quant_core.schemes.tokens import asymmetric_codes


@register_scheme("W8A8_DYNAMIC", "moe")
class AscendW8A8DynamicMoEMethod(AscendMoEScheme):
    """Each product as in a linear layer of this type.

    Run time, of E experts on this rank, with g groups of input features (1: per channel):
        w13_weight: int8 [E, hidden, 2 · intermediate]
        w2_weight: int8 [E, intermediate, hidden]
            on CPU lists of packed weights w13_packed and w2_packed, where the processor multiplies those rightly
        w13_weight_scale, w2_weight_scale: float32 [E, out], or [E, g, out], which the CPU's operator alone takes
        w13_weight_offset, w2_weight_offset, w13_weight_sum, w2_weight_sum: [E, out], as in a linear layer of this type
    """

    granularity: ClassVar[tuple[str, ...]] = ("per channel", "per tensor")
    checked_against: ClassVar[dict[str, tuple[str, ...]]] = {
        "W8A8_DYNAMIC": (
            "qwen3-moe/W8A8_DYNAMIC",
            "deepseek-v3/W8A8",
            "llmcompressor/qwen3-moe/W8A8_DYNAMIC",
        )
    }
    linear = AscendW8A8DynamicLinearMethod
    #: Whether the hidden state is quantised as the fused operator does it.
    fuses: ClassVar[bool] = True

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """As all experts; the sums of groups are not to be had, so that no zero points can be taken off them."""
        reasons = super().can_serve(context)
        assert isinstance(context, ExpertsContext)
        for half in context.halves.values():
            weight = half.form.weight
            if weight is not None and weight.strategy == "group" and _linear(cls.linear.create(half)).corrects:
                reasons.append(
                    "experts with scales per group have neither asymmetric weights nor asymmetric inputs: quantise "
                    "with symmetric ones, or with scales per channel"
                )
        return list(dict.fromkeys(reasons))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As all experts; on CPU weights are rearranged once, which takes longer than the product of a few rows."""
        for half in self.halves:
            vars(layer).pop(f"{half}{PACKED}", None)
        super().process_weights_after_loading(layer)
        for half in self.halves:
            weight = layer.get_parameter(f"{half}weight")
            if weight.dtype != torch.int8:
                continue
            if weight.device.type != "cpu":
                replace_parameter(layer, f"{half}weight", torch.ops.npu.npu_format_cast(weight.data, FRACTAL_NZ))
            elif current_device() == "cpu" and tensor_of(layer, f"{half}weight_scale").dim() == 2:
                packed = pack_each(weight.data)
                if packed is not None:
                    delattr(layer, f"{half}weight")
                    setattr(layer, f"{half}{PACKED}", packed)

    def compute(self, layer: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Where nothing lies between the products but SwiGLU, the first one, SwiGLU and quantising are one operator."""
        sizes, scales = self.context.sizes, tensor_of(layer, f"{GATE_UP}weight_scale")
        alone = self.halves[DOWN].context.partition.max_over_ranks is None  # each rank quantises by itself
        plain = (sizes.activation, sizes.limit) == ("silu", None) and scales.dim() == 2
        plain = plain and not (_linear(self.halves[GATE_UP]).corrects or _linear(self.halves[DOWN]).asymmetric_input)
        if not (self.fuses and alone and plain):
            return super().compute(layer, rows, dtype)
        assert rows.scale is not None
        codes, scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            rows.values, weights_of(layer, GATE_UP), [scales], rows.scale, rows.counts, group_list_type=1
        )
        return self.multiply(layer, DOWN, Rows(codes, scale, rows.counts), dtype)

    @property
    def sends_int8(self) -> bool:
        """True, unless inputs have zero points or other codes."""
        return self.fuses and not _linear(self.halves[GATE_UP]).asymmetric_input

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """One scale for each row. Asymmetric inputs are quantised with the product, which needs their zero points."""
        linear = _linear(self.halves[half])
        return (x, None) if linear.asymmetric_input else linear.quantize_tokens(x)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator; where there are zero points it gives sums, which are completed here."""
        if _linear(self.halves[half]).corrects:
            return self._completed(layer, half, rows).to(dtype)
        return self.multiply_plainly(layer, half, rows, dtype)

    def multiply_plainly(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """The product without zero points; arguments as those of `multiply`."""
        return grouped(layer, half, rows, scale="weight_scale", output_dtype=dtype)

    def _completed(self, layer: nn.Module, half: str, rows: Rows) -> Tensor:
        """The product with zero points, float32; see the linear layer of this type."""
        linear, experts = _linear(self.halves[half]), experts_of(rows)
        codes, x_scale, x_offset = rows.values, rows.scale, None
        if linear.asymmetric_input:
            codes, x_scale, x_offset = asymmetric_codes(rows.values, linear.context.partition)
        assert x_scale is not None
        sums = grouped(layer, half, Rows(codes, None, rows.counts), output_dtype=torch.int32)
        offset: Tensor | None = getattr(layer, f"{half}weight_offset", None)
        if offset is not None:
            sums = sums - codes.sum(dim=-1, keepdim=True, dtype=torch.int32) * offset[experts]
        y = sums * tensor_of(layer, f"{half}weight_scale")[experts]
        if x_offset is not None:
            y = y - x_offset[:, None] * tensor_of(layer, f"{half}weight_sum")[experts]
        return y * x_scale[:, None]


def _linear(scheme: AscendLinearScheme) -> AscendW8A8DynamicLinearMethod:
    assert isinstance(scheme, AscendW8A8DynamicLinearMethod)
    return scheme
