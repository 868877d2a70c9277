"""W4A4_FLATQUANT_DYNAMIC: int4 weights, and int4 activations per token after FlatQuant's transform."""

import itertools

import torch
from torch import Tensor, nn

from quant_core.errors import LimitError
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.flatquant import (
    get_decompose_dim,
    identity_transform,
    matrices_of,
    process_transform,
    transform_params,
    transform_reasons,
    transform_sizes,
    turned_back,
)
from quant_core.schemes.params import Param, replace_parameter, tensor_of
from quant_core.schemes.registry import register_scheme
from quant_core.schemes.run_time import drop
from quant_core.storage import IntegerStorage, tensors_of
from quant_core.stored import ActivationForm, WeightForm

__all__ = [
    "AscendW4A4FlatQuantDynamicLinearMethod",
    "batched_kronecker_quant",
    "get_decompose_dim",
    "pack_int4_weights",
]

#: Tokens of one call of the operator.
_TOKENS = 32768

#: Features of a matrix that it takes.
_LARGEST = 256

#: Rows of a weight that are packed at a time: the operator wants four bytes for each value.
_ROWS = 256


def pack_int4_weights(weight: Tensor) -> Tensor:
    """Values from -8 to 7 [n, k], eight along k to an int32 [n, k / 8].

    Raises:
        LimitError: for a k that is not a multiple of 8.

    """
    _whole_packs(weight.shape[1])
    parts = [torch.ops.npu.npu_convert_weight_to_int4pack(rows.to(torch.int32)) for rows in weight.split(_ROWS)]
    return torch.cat(parts)


def batched_kronecker_quant(
    x: Tensor, left_trans: Tensor, right_trans: Tensor, clip_ratio: float | Tensor
) -> tuple[Tensor, Tensor]:
    """left_trans · X · right_trans of each token, quantised to int4 per token, in calls that the operator can take.

    Args:
        x: [tokens, L, R], floating.
        left_trans: [L, L] in x's dtype; for a checkpoint's matrix, its transpose.
        right_trans: [R, R] in x's dtype.
        clip_ratio: how much of a token's largest magnitude the codes reach. Compiled code bakes in a number; a tensor
            [1], on CPU, is read at each call.

    Returns:
        int32 codes [tokens, L, R / 8] and float32 scales [tokens].

    """
    # An operator of its own in compiled code, which must not decide by the number of tokens that it was traced with.
    compiling = torch.compiler.is_compiling()
    if isinstance(clip_ratio, Tensor):
        by_ratio = _by_stored_ratio_operator if compiling else _by_stored_ratio
        codes, scales = by_ratio(x, left_trans, right_trans, clip_ratio)
    else:
        chunked = _kronecker_quant_operator if compiling else _kronecker_quant_in_chunks
        codes, scales = chunked(x, left_trans, right_trans, clip_ratio)
    return codes, scales


def _kronecker_quant_in_chunks(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    parts = [
        torch.ops.npu.npu_kronecker_quant(chunk, left, right, clip_ratio=clip_ratio, dst_dtype=torch.int32)
        for chunk in x.split(_TOKENS)
    ]
    if len(parts) == 1:
        codes, scales = parts[0]
        return codes, scales
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _by_stored_ratio(x: Tensor, left: Tensor, right: Tensor, clip_ratio: Tensor) -> tuple[Tensor, Tensor]:
    return _kronecker_quant_in_chunks(x, left, right, clip_ratio.item())


_kronecker_quant_operator = torch.library.custom_op(
    "quant_core::batched_kronecker_quant", _kronecker_quant_in_chunks, mutates_args=()
)
_by_stored_ratio_operator = torch.library.custom_op(
    "quant_core::kronecker_quant_by_stored_ratio", _by_stored_ratio, mutates_args=()
)


@_kronecker_quant_operator.register_fake
@_by_stored_ratio_operator.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float | Tensor) -> tuple[Tensor, Tensor]:
    tokens, rows, columns = x.shape
    codes = x.new_empty((tokens, rows, columns // 8), dtype=torch.int32)
    return codes, x.new_empty((tokens,), dtype=torch.float32)


@register_scheme("W4A4_FLATQUANT_DYNAMIC", "linear")
class AscendW4A4FlatQuantDynamicLinearMethod(AscendLinearScheme):
    """y = (a qᵀ) · x_scale · weight_scale + bias, a = rint(X' / x_scale), X' = left_transᵀ · X · right_trans.

    x_scale = max|X'| · clip_ratio / 7 per token, and codes saturate at -8 and 7.

    Stored beside the weight, with L · R = in:
        left_trans: float [L, L]
        right_trans: float [R, R], absent where it is the identity
        clip_ratio: float [1], of each member of a fused layer its own

    Run time:
        weight: int32 [out, in / 8], never in the NZ layout, which the operator cannot take
        weight_scale: float32 [out]
        left_trans: model dtype [L, L], transposed
        right_trans: model dtype [R, R]
        clip_ratio: float32 [members], on CPU and where the values come later; elsewhere numbers, which the operator
            wants
    """

    granularity = ("per channel",)
    checked_against = {"W4A4_FLATQUANT_DYNAMIC": ("qwen3/W4A4_FLATQUANT_DYNAMIC",)}
    supported_devices = ("910B", "910C", "950", "cpu")
    stores = WeightForm(num_bits=4)
    activation = ActivationForm(num_bits=4)

    storage: IntegerStorage
    _ratios: tuple[float, ...] | None = None
    _runs: tuple[tuple[float, int, int], ...]

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Sizes that int4 and the transform allow, and no rotation across tensor-parallel ranks."""
        assert isinstance(context, LinearContext)
        reasons = super().can_serve(context)
        if context.input_size % 8:
            return [*reasons, f"{context.input_size} input features are not a multiple of 8, as int4 packing wants"]
        unfit = transform_reasons(context)
        if not unfit:
            left, right = transform_sizes(context)
            if max(left, right) > _LARGEST:
                unfit = [f"the operator takes matrices of up to {_LARGEST}, these are of {left} and {right}"]
            elif right % 8:
                unfit = [f"right_trans of {right} is not a multiple of 8, as int4 packing wants"]
        return reasons + unfit

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`; a LimitError for an input size that is not a multiple of 8."""
        _whole_packs(input_size)
        return super().get_weight(input_size, output_size, params_dtype)

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """`left_trans`, `right_trans` and `clip_ratio`."""
        return transform_params(self.context)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weight, transpose left_trans, take clip ratios off the layer, drop the offset, which is zero.

        Where the values come later, the ratios stay on the layer, from which a CPU can read them at each call. A device
        cannot: it would wait for the number, and a captured graph holds the one of its capture.

        Raises:
            LimitError: if a reload would change the clip ratios, which compiled code has baked in.

        """
        ratios = layer.get_parameter("clip_ratio").data.to(torch.float32)
        if self.context.values_later and ratios.device.type == "cpu":
            replace_parameter(layer, "clip_ratio", ratios)
        else:
            self._remember(tuple(ratios.tolist()))
            del layer.clip_ratio
        stored = tensors_of(layer)
        replace_parameter(layer, "weight", pack_int4_weights(self.storage.codes(stored)))
        replace_parameter(layer, "weight_scale", self.storage.scale(stored).flatten())
        process_transform(layer, self.context)
        drop(layer, "weight_offset", "weight_channel_scale", "weight_channel_offset")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Transform and quantise once per distinct clip ratio, then multiply with the rows of the members that have it.

        Raises:
            LimitError: if the layer's matrices do not transform so many features.

        """
        tokens, left, right = matrices_of(layer, x)
        weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "weight_scale")
        parts = []
        for (codes, x_scale), start, stop in self._quantised(layer, tokens, left, right):
            parts.append(
                torch.ops.npu.npu_quant_matmul(
                    codes.flatten(1),
                    weight[start:stop].t(),
                    scale[start:stop],
                    pertoken_scale=x_scale,
                    output_dtype=x.dtype,
                )
            )
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """The stored weight, turned back: left_trans · W · right_transᵀ for each output feature's W [L, R]."""
        return turned_back(layer, super().dequantize(layer))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The largest magnitude of a channel becomes 7; without calibration the transform is the identity."""
        return super().quantize(weight) | identity_transform(self.context)

    def _quantised(
        self, layer: nn.Module, tokens: Tensor, left: Tensor, right: Tensor
    ) -> list[tuple[tuple[Tensor, Tensor], int, int]]:
        """Codes and scales of the tokens, and the rows of the weight that they are multiplied with."""
        if self._ratios is not None:
            found = {
                ratio: batched_kronecker_quant(tokens, left, right, ratio) for ratio in dict.fromkeys(self._ratios)
            }
            return [(found[ratio], start, stop) for ratio, start, stop in self._runs]
        ratios = tensor_of(layer, "clip_ratio").split(1)
        stops = itertools.accumulate(shard.local_output_size for shard in self.context.shards)
        return [
            (batched_kronecker_quant(tokens, left, right, ratio), stop - shard.local_output_size, stop)
            for ratio, shard, stop in zip(ratios, self.context.shards, stops, strict=True)
        ]

    def _remember(self, ratios: tuple[float, ...]) -> None:
        """Keep each member's clip ratio with its rows; neighbours of one ratio are one run."""
        if self._ratios not in (None, ratios):
            raise LimitError(
                f"{self.context.name}: the reloaded weights have other clip ratios than before",
                where=", ".join(f"{shard.name}.clip_ratio" for shard in self.context.shards),
                found=ratios,
                expected=f"{self._ratios}, which compiled code has baked in",
                todo="start the engine anew with these weights",
            )
        self._ratios = ratios
        runs: list[tuple[float, int, int]] = []
        start = 0
        for ratio, shard in zip(ratios, self.context.shards, strict=True):
            stop = start + shard.local_output_size
            if runs and runs[-1][0] == ratio:
                runs[-1] = (ratio, runs[-1][1], stop)
            else:
                runs.append((ratio, start, stop))
            start = stop
        self._runs = tuple(runs)


def _whole_packs(k: int) -> None:
    if k % 8:
        raise LimitError(
            f"{k} input features cannot be packed as int4", expected="a multiple of 8: so many values are one int32"
        )
