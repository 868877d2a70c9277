"""W8A8: int8 weights, activations quantised with a scale and zero point found by calibration.

W8A8S stores the same; its weights are sparse and of few bits, which shows in nothing but their values.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from quant_core.errors import LoadError
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.params import float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight
from quant_core.schemes.static_inputs import InputRuns, part
from quant_core.storage import IntegerStorage, StaticStorage, Storage, UnfoldedStorage, tensors_of
from quant_core.stored import ActivationForm, StoredForm, WeightForm

#: What msModelSlim writes into quant_bias of some float16 models, where b / deq_scale overflows in float16.
_OVERFLOWED = -(2**31)


@register_scheme("W8A8", "linear")
@register_scheme("W8A8S", "linear")
class AscendW8A8LinearMethod(AscendLinearScheme):
    """y = (a qᵀ + quant_bias) · deq_scale, a = clamp(rint(x / input_scale + input_offset), -128, 127).

    Where the writer folded (`ActivationForm.folded`), `quant_bias` holds both the zero point's correction and the
    layer's bias, so the bias is not added again. Otherwise deq_scale = input_scale · weight_scale, quant_bias =
    -input_offset · Σ q of this rank's input features, and the bias is added in float.

    Run time, with g runs of members that share an input scale (1, where calibration saw q, k and v together; one for
    each member, where the values come later):
        weight: int8 [in, out]
        input_scale: float32 [g]
        input_offset: float32 [g], unless the input is symmetric
        deq_scale: float32 [out], encoded int64 for float16 results
        quant_bias: int32 [out], where the writer folded or the input is not symmetric
    """

    granularity = ("per channel", "per tensor")
    checked_against = {
        "W8A8": (
            "qwen3/W8A8",
            "qwen3/W8A8_FP16",
            "qwen3/V0_W8A8_LEGACYNAMES",
            "qwen3/V0_W8A8_M4",
            "qwen2/W8A8",
            "qwen3/MIXED_LAYERS",
        ),
        "W8A8S": ("qwen3/V0_W8A8S",),
    }
    folds_bias = True

    stores = WeightForm()
    activation = ActivationForm(dynamic=False, strategy="tensor", symmetric=False, folded=True)
    strategies = ("channel", "tensor")
    inputs: InputRuns

    @classmethod
    def create(cls, context: LayerContext) -> Self:
        """Whether the bias is folded is stated of the layer."""
        scheme = super().create(context)
        scheme.inputs = InputRuns(scheme.context)
        scheme.folds_bias = _folded(scheme.context.form)  # type: ignore[misc]
        return scheme

    @classmethod
    def takes_input(cls, form: ActivationForm) -> bool:
        """Folded or not, symmetric or not."""
        return replace(form, symmetric=False, folded=True) == cls.activation

    @classmethod
    def storage_of(cls, form: StoredForm) -> Storage:
        """By whether the writer folded."""
        return (StaticStorage if _folded(form) else UnfoldedStorage)(form, cls.stores)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose the weight, merge equal input scales, encode the output scale, keep the bias on one rank.

        Raises:
            LoadError: for a quant_bias that the tool overflowed and that cannot be computed again.

        """
        if self.folds_bias:
            replace_parameter(layer, "quant_bias", self._quant_bias(layer))
        else:
            self._fold(layer)
        process_int8_weight(layer, layer.get_parameter("weight").data)
        self.inputs.merge(layer, "input_scale", "input_offset")
        deq_scale = float_values(layer.get_parameter("deq_scale").data)
        if self.context.params_dtype == torch.float16:
            deq_scale = torch.ops.npu.npu_trans_quant_param(deq_scale)
        replace_parameter(layer, "deq_scale", deq_scale)
        drop(layer, "weight_scale", "weight_offset")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply; once per distinct input scale."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, deq_scale = tensor_of(layer, "weight"), tensor_of(layer, "deq_scale")
        inside: Tensor | None = getattr(layer, "quant_bias", None)
        after = None if self.folds_bias else bias
        if inside is None and x.dtype != torch.float16:  # whose results the operator scales before a float bias
            inside, after = after, None

        scale, offset = tensor_of(layer, "input_scale"), getattr(layer, "input_offset", None)

        def multiply(run: slice | None, features: slice | None) -> Tensor:
            zero_point = None if offset is None else part(offset, run)
            codes = torch.ops.npu.npu_quantize(rows, part(scale, run), zero_point, torch.qint8, -1, True)
            y: Tensor = torch.ops.npu.npu_quant_matmul(
                codes,
                weight if features is None else weight[:, features],
                part(deq_scale, features),
                bias=None if inside is None else part(inside, features),
                output_dtype=x.dtype,
            )
            return y

        y = self.inputs.product(multiply)
        y = y if after is None else y + after.to(y.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Folded, weight times deq_scale / input_scale, of which each member may have its own."""
        stored = dict(tensors_of(layer))
        if len(stored["input_scale"]) > 1:
            stored["input_scale"] = self.inputs.of_rows(stored["input_scale"])
        return self.storage.dequantize(stored)

    def _fold(self, layer: nn.Module) -> None:
        """`deq_scale` and `quant_bias`, by exact integers; what the weight alone is multiplied with goes."""
        assert isinstance(self.storage, IntegerStorage)
        stored = tensors_of(layer)
        codes, scale = self.storage.codes(stored), self.storage.scale(stored).flatten()
        replace_parameter(layer, "weight", codes)
        replace_parameter(layer, "deq_scale", self.inputs.of_rows(float_values(stored["input_scale"])) * scale)
        if "input_offset" not in stored:
            return
        if self.context.form.input is not None and self.context.form.input.symmetric:
            drop(layer, "input_offset")  # checked to be zero
            return
        offset = self.inputs.of_rows(stored["input_offset"].to(torch.int32))
        replace_parameter(layer, "quant_bias", -offset * codes.sum(dim=1, dtype=torch.int32))

    def _quant_bias(self, layer: nn.Module) -> Tensor:
        """`quant_bias` as this rank adds it: a row-parallel layer's belongs to the sum over all ranks, once."""
        partition, stored = self.context.partition, layer.get_parameter("quant_bias").data
        elsewhere = partition.kind == "row" and partition.rank > 0
        lost = stored == _OVERFLOWED
        kept = torch.zeros_like(stored) if elsewhere else stored
        if not bool(lost.any()):
            return kept
        bias = getattr(layer, "bias", None)
        if bias is None:
            raise LoadError(
                f"{self.context.name}: quant_bias cannot be used",
                where=", ".join(f"{name}.quant_bias" for name in self._members(lost)),
                found=f"{int(lost.sum())} of {lost.numel()} values are {_OVERFLOWED}: the tool overflowed",
                expected="a bias tensor beside it, from which it can be computed again",
                todo="quantise the model again in bfloat16",
            )
        # quant_bias = rint(b / deq_scale - input_offset · Σ q) (docs/formats/modelslim.md, 4.1); of the sum over all
        # input features, each rank of a row-parallel layer adds its own part.
        offsets = getattr(layer, "input_offset", torch.zeros_like(layer.get_parameter("input_scale")))
        value = -self.inputs.of_rows(offsets.data.to(torch.float64)) * layer.get_parameter("weight").data.sum(
            dim=1, dtype=torch.int64
        )
        if not elsewhere:
            value += bias.data.to(torch.float64) / float_values(layer.get_parameter("deq_scale").data)
        return torch.where(lost, value.round().to(torch.int32), kept)

    def _members(self, rows: Tensor) -> list[str]:
        """The modules of the output features that are marked."""
        parts = rows.split([shard.local_output_size for shard in self.context.shards])
        return [shard.name for shard, part in zip(self.context.shards, parts, strict=True) if bool(part.any())]


def _folded(form: StoredForm) -> bool:
    """Whether the writer folded scales and bias; the usual form where nothing is stated."""
    return form.input is None or form.input.folded
