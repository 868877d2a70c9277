"""What the microscaling (MX) linear types share: blocks of 32 input features with a power of two as their scale."""

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quant_core import microscaling as mx
from quant_core.devices import current_device
from quant_core.ops.dtypes import FLOAT4_E2M1, FLOAT8_E8M0
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext
from quant_core.schemes.params import Param, replace_parameter, tensor_of

#: Products whose chips have MX operators, and CPU.
MX_DEVICES = ("950", "cpu")

#: Arguments of npu_dynamic_mx_quant. FP4 ties go away from zero, as vllm-ascend calls it.
TO_FP8: dict[str, Any] = {"dst_type": torch.float8_e4m3fn, "round_mode": "rint", "scale_alg": 0}
TO_FP4: dict[str, Any] = {"dst_type": FLOAT4_E2M1, "round_mode": "round", "scale_alg": 0}


def mx_weight(input_size: int, output_size: int, fp4: bool) -> dict[str, Param]:
    """`weight`: FP8 [out, in], or FP4 in uint8 [out, in / 2]."""
    if fp4:
        return {"weight": Param((output_size, input_size // 2), torch.uint8, output_dim=0, input_dim=1, input_step=2)}
    return {"weight": fp8_weight(input_size, output_size)}


def fp8_weight(input_size: int, output_size: int) -> Param:
    """An E4M3 weight [out, in]."""
    return Param((output_size, input_size), torch.float8_e4m3fn, output_dim=0, input_dim=1, check=no_nan)


def mx_scale(input_size: int, output_size: int) -> Param:
    """Exponents, uint8 [out, ceil(in / 32)]."""
    return Param(
        (output_size, mx.blocks_of(input_size)),
        torch.uint8,
        output_dim=0,
        input_dim=1,
        input_step=mx.BLOCK,
        check=no_nan_exponent,
        dummy=mx.E8M0_ONE,
    )


def no_nan(stored: Tensor) -> str | None:
    """ValueCheck of FP8 codes: no NaN."""
    bad = int(stored.to(torch.float32).isnan().sum())
    return f"{bad} of {stored.numel()} values are NaN" if bad else None


def no_nan_exponent(stored: Tensor) -> str | None:
    """ValueCheck of E8M0 exponents: no NaN."""
    bad = int((stored == mx.E8M0_NAN).sum())
    return f"{bad} of {stored.numel()} exponents are NaN (255)" if bad else None


def run_time_weight(stored: Tensor) -> Tensor:
    """A stored weight with the values that its operator takes.

    On CPU these are decoded once: looking codes up at each call takes longer than the product for few tokens. The
    CPU kernels take the result as they take the codes. That is ours, and torch_npu's Meta kernels refuse it in a model
    that is compiled: beside torch_npu it stays with the codes.

    Args:
        stored: FP8 [out, in], or FP4 in uint8 [out, in / 2].

    Returns:
        What is stored; on CPU bfloat16 [out, in], or of FP4 int8 [out, in] with twice the values, all exact.

    """
    if current_device() != "cpu" or sys.modules.get("torch_npu") is not None:
        return stored
    if stored.dtype != torch.uint8:
        return stored.to(torch.bfloat16)
    every_byte = torch.arange(256, dtype=torch.uint8, device=stored.device)
    doubled = (2 * mx.e2m1_values(mx.unpack_e2m1(every_byte))).to(torch.int8)
    # Both values of a byte are looked up as one int16.
    return doubled.view(torch.int16)[stored.to(torch.int32)].view(torch.int8)


def mx_multiply(
    codes: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, fp4: Sequence[bool], **form: Any
) -> Tensor:
    """npu_quant_matmul of microscaled operands.

    Args:
        codes: [m, k] FP8, or [m, k / 2] uint8.
        x_scale: uint8 [m, ceil(k / 64), 2].
        weight: the view [k, n] or [k / 2, n] of a weight [n, ...] in its run-time form.
        scale: the view [ceil(k / 64), n, 2] of exponents [n, ceil(k / 64), 2].
        bias: [n], handed over in float32.
        fp4: whether codes and weight are FP4.
        **form: output_dtype and group_sizes.

    Returns:
        [m, n].

    """
    carried = [FLOAT4_E2M1 if four else None for four in fp4]
    y: Tensor = torch.ops.npu.npu_quant_matmul(
        codes,
        weight,
        scale,
        pertoken_scale=x_scale,
        bias=None if bias is None else bias.to(torch.float32),
        x1_dtype=carried[0],
        x2_dtype=carried[1],
        scale_dtype=FLOAT8_E8M0,
        pertoken_scale_dtype=FLOAT8_E8M0,
        **form,
    )
    return y


def mx_weight_values(weight: Tensor, scale: Tensor) -> Tensor:
    """A stored weight as float32 [out, in]: FP8 [out, in] or FP4 in uint8 [out, in / 2], times 2^(scale - 127)."""
    fp4 = weight.dtype == torch.uint8
    values = mx.e2m1_values(mx.unpack_e2m1(weight)) if fp4 else weight.to(torch.float32)
    return mx.scale_blocks_(values, mx.e8m0_values(scale))


def quantise_mx_weight(weight: Tensor, fp4: bool) -> dict[str, Tensor]:
    """`weight` and `weight_scale` by msModelSlim's rule.

    FP8 has floor(log2(max)) - 8 as exponent and saturates beyond 448. FP4 has floor(log2(max · 8/7)) - 2, so that a
    block reaches to 7 and is clipped at 6; its ties go away from zero.
    """
    blocks = mx.in_blocks(weight.to(torch.float32))
    peaks = blocks.abs().amax(-1)
    exponents = mx.floor_exponents(peaks * 8 / 7, 2) if fp4 else mx.floor_exponents(peaks, 8)
    scaled = (blocks / mx.e8m0_values(exponents)[..., None]).flatten(-2)[:, : weight.shape[1]]
    if fp4:
        return {"weight": mx.pack_e2m1(mx.e2m1_codes(scaled, ties_away=True)), "weight_scale": exponents}
    return {"weight": scaled.clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale": exponents}


class MXLinearScheme(AscendLinearScheme):
    """y = Σ over blocks of 32 input features of (a · 2^x_scale)(q · 2^weight_scale)ᵀ, + bias.

    Ranks of a row-parallel layer hold whole blocks, so the blocks of an activation are the same on any number of ranks.

    Attributes:
        weight_fp4: whether the weight is FP4; else it is FP8.
        quantisation: arguments of npu_dynamic_mx_quant for the activations.
        group_sizes: of npu_quant_matmul.
        operator_adds_bias: whether it takes the bias of the layer, [n] in float32.

    """

    supported_devices = MX_DEVICES
    weight_fp4: ClassVar[bool]
    quantisation: ClassVar[dict[str, Any]]
    group_sizes: ClassVar[list[int]] = [1, 1, mx.BLOCK]
    operator_adds_bias: ClassVar[bool] = True

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Whole bytes only."""
        odd = cls._has_fp4() and context.input_size % 2
        reason = [f"{context.input_size} input features are no whole number of bytes with two FP4 values each"]
        return super().can_serve(context) + (reason if odd else [])

    @classmethod
    def _has_fp4(cls) -> bool:
        return cls.weight_fp4 or cls.quantisation["dst_type"] == FLOAT4_E2M1

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight`."""
        return mx_weight(input_size, output_size, self.weight_fp4)

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """`weight_scale`."""
        return {"weight_scale": mx_scale(input_size, output_size)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn weight and exponents, both as views: the operator wants them transposed alike."""
        replace_parameter(layer, "weight", run_time_weight(layer.get_parameter("weight").data).t())
        pairs = mx.pair_exponents(layer.get_parameter("weight_scale").data)
        replace_parameter(layer, "weight_scale", pairs.transpose(0, 1))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        codes, x_scale = torch.ops.npu.npu_dynamic_mx_quant(x.reshape(-1, x.shape[-1]), **self.quantisation)
        y = mx_multiply(
            codes,
            x_scale,
            tensor_of(layer, "weight"),
            tensor_of(layer, "weight_scale"),
            bias if self.operator_adds_bias else None,
            (self.quantisation["dst_type"] == FLOAT4_E2M1, self.weight_fp4),
            output_dtype=x.dtype,
            group_sizes=self.group_sizes,
        )
        if bias is not None and not self.operator_adds_bias:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Elements times their block's power of two."""
        return mx_weight_values(layer.get_parameter("weight").data, layer.get_parameter("weight_scale").data)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As msModelSlim chooses exponents from each block's largest magnitude."""
        return quantise_mx_weight(weight, self.weight_fp4)
