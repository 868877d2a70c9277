"""W8A8: int8 weights per output channel, activations quantised with a scale and zero point found by calibration.

W8A8S stores the same; its weights are sparse and of few bits, which shows in nothing but their values.
"""

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError, LoadError
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import float_values, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop, process_int8_weight
from quant_core.storage import StaticStorage, tensors_of
from quant_core.stored import ActivationForm, WeightForm

#: What msModelSlim writes into quant_bias of some float16 models, where b / deq_scale overflows in float16.
_OVERFLOWED = -(2**31)


@register_scheme("W8A8", "linear")
@register_scheme("W8A8S", "linear")
class AscendW8A8LinearMethod(AscendLinearScheme):
    """y = (a qᵀ + quant_bias) · deq_scale, a = clamp(rint(x / input_scale + input_offset), -128, 127).

    `quant_bias` holds both the zero point's correction and the layer's bias, so the bias is not added again.

    Run time, with g runs of members that share an input scale (1, where calibration saw q, k and v together; one for
    each member, where the values come later):
        weight: int8 [in, out]
        input_scale, input_offset: float32 [g]
        deq_scale: float32 [out], encoded int64 for float16 results
        quant_bias: int32 [out]
    """

    granularity = ("per channel",)
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
    storage_class = StaticStorage

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Transpose the weight, merge equal input scales, encode the output scale, keep the bias on one rank.

        Raises:
            LoadError: for a quant_bias that the tool overflowed and that cannot be computed again.

        """
        replace_parameter(layer, "quant_bias", self._quant_bias(layer))
        process_int8_weight(layer, layer.get_parameter("weight").data)
        scales = float_values(layer.get_parameter("input_scale").data)
        offsets = layer.get_parameter("input_offset").data.to(torch.float32)
        firsts = self._first_members(scales, offsets)
        replace_parameter(layer, "input_scale", scales[firsts])
        replace_parameter(layer, "input_offset", offsets[firsts])
        deq_scale = float_values(layer.get_parameter("deq_scale").data)
        if self.context.params_dtype == torch.float16:
            deq_scale = torch.ops.npu.npu_trans_quant_param(deq_scale)
        replace_parameter(layer, "deq_scale", deq_scale)
        drop(layer, "weight_scale", "weight_offset")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply; once per distinct input scale."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        scale, offset = tensor_of(layer, "input_scale"), tensor_of(layer, "input_offset")
        weight, deq_scale = tensor_of(layer, "weight"), tensor_of(layer, "deq_scale")
        bias = tensor_of(layer, "quant_bias")
        if len(self._runs) == 1:  # the usual case, for which slices would take longer than all the rest
            codes = torch.ops.npu.npu_quantize(rows, scale, offset, torch.qint8, -1, True)
            y: Tensor = torch.ops.npu.npu_quant_matmul(codes, weight, deq_scale, bias=bias, output_dtype=x.dtype)
        else:
            parts = []
            for g, (start, stop) in enumerate(self._runs):
                codes = torch.ops.npu.npu_quantize(rows, scale[g : g + 1], offset[g : g + 1], torch.qint8, -1, True)
                part, part_scale, part_bias = weight[:, start:stop], deq_scale[start:stop], bias[start:stop]
                parts.append(
                    torch.ops.npu.npu_quant_matmul(codes, part, part_scale, bias=part_bias, output_dtype=x.dtype)
                )
            y = torch.cat(parts, dim=-1)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Weight times deq_scale / input_scale, of which each member may have its own."""
        stored = dict(tensors_of(layer))
        if len(stored["input_scale"]) > 1:
            stored["input_scale"] = self._per_row(stored["input_scale"])
        return self.storage.dequantize(stored)

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
        offsets = self._per_row(layer.get_parameter("input_offset").data.to(torch.float64))
        value = -offsets * layer.get_parameter("weight").data.sum(dim=1, dtype=torch.int64)
        if not elsewhere:
            value += bias.data.to(torch.float64) / float_values(layer.get_parameter("deq_scale").data)
        return torch.where(lost, value.round().to(torch.int32), kept)

    def _members(self, rows: Tensor) -> list[str]:
        """The modules of the output features that are marked."""
        parts = rows.split([shard.local_output_size for shard in self.context.shards])
        return [shard.name for shard, part in zip(self.context.shards, parts, strict=True) if bool(part.any())]

    def _per_row(self, members: Tensor) -> Tensor:
        """One value per member as one per output feature of this rank."""
        counts = [shard.local_output_size for shard in self.context.shards]
        return members.repeat_interleave(torch.tensor(counts, device=members.device))

    def _first_members(self, scales: Tensor, offsets: Tensor) -> list[int]:
        """The first member of each run that shares scale and offset; remembers the rows of the runs.

        Made-up scales say nothing about the real ones: each member is a run of its own then.

        Raises:
            LimitError: if a reload would change the runs, which compiled code has baked in.

        """
        pairs = torch.stack([scales, offsets], dim=1)
        differ = (pairs[1:] != pairs[:-1]).any(dim=1) | self.context.values_later
        firsts = [0, *(differ.nonzero().flatten() + 1).tolist()]
        ends = [0]
        for shard in self.context.shards:
            ends.append(ends[-1] + shard.local_output_size)
        runs = tuple((ends[a], ends[b]) for a, b in zip(firsts, [*firsts[1:], len(self.context.shards)], strict=True))
        if getattr(self, "_runs", runs) != runs:
            raise LimitError(
                f"{self.context.name}: the reloaded weights share their input scales among other members than before",
                found=f"rows {runs}",
                expected=f"rows {self._runs}",
                todo="start the engine anew with these weights",
            )
        self._runs: tuple[tuple[int, int], ...] = runs
        return firsts
