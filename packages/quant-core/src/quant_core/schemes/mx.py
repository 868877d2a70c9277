"""What the microscaling (MX) linear types compute alike: blocks of 32 input features that share a power of two."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quant_core import microscaling as mx
from quant_core.devices import current_device
from quant_core.ops.dtypes import FLOAT4_E2M1, FLOAT8_E8M0
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.storage import MicroscaledStorage
from quant_core.stored import ActivationForm, Packing, WeightForm

#: Products whose chips have MX operators, and CPU.
MX_DEVICES = ("950", "cpu")

#: How weights are stored: FP8 or FP4 in blocks of 32 that share an exponent.
MXFP8 = WeightForm(type="float", strategy="group", group_size=mx.BLOCK, scale_dtype=torch.uint8)
MXFP4 = replace(MXFP8, num_bits=4, packing=Packing(axis=1))

#: The same of activations, at run time.
TOKENS_MXFP8 = ActivationForm(type="float", strategy="group", group_size=mx.BLOCK, scale_dtype=torch.uint8)
TOKENS_MXFP4 = replace(TOKENS_MXFP8, num_bits=4, ties="away")  # as vllm-ascend calls the operator

#: Arguments of npu_dynamic_mx_quant.
TO_FP8: dict[str, Any] = {"dst_type": torch.float8_e4m3fn, "scale_alg": 0}
TO_FP4: dict[str, Any] = {"dst_type": FLOAT4_E2M1, "scale_alg": 0}


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


class MXLinearScheme(AscendLinearScheme):
    """y = Σ over blocks of 32 input features of (a · 2^x_scale)(q · 2^weight_scale)ᵀ, + bias.

    Ranks of a row-parallel layer hold whole blocks, so the blocks of an activation are the same on any number of ranks.

    Attributes:
        quantisation: arguments of npu_dynamic_mx_quant for the activations.
        group_sizes: of npu_quant_matmul.
        operator_adds_bias: whether it takes the bias of the layer, [n] in float32.

    """

    supported_devices = MX_DEVICES
    quantisation: ClassVar[dict[str, Any]]
    group_sizes: ClassVar[list[int]] = [1, 1, mx.BLOCK]
    operator_adds_bias: ClassVar[bool] = True
    strategies = ("group",)
    storage: MicroscaledStorage

    @classmethod
    def takes_input(cls, form: ActivationForm) -> bool:
        """Wherever ties go: the operator can do both."""
        return cls.activation is not None and replace(form, ties=cls.activation.ties) == cls.activation

    @property
    def round_mode(self) -> str:
        """Where ties go, in the operator's words."""
        form = self.context.form.input or self.activation
        return "round" if form is not None and form.ties == "away" else "rint"

    def quantize_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of an input [tokens, in] and the exponents of its blocks [tokens, ceil(in / 64), 2]."""
        codes, scale = torch.ops.npu.npu_dynamic_mx_quant(rows, round_mode=self.round_mode, **self.quantisation)
        return codes, scale

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn weight and exponents, both as views: the operator wants them transposed alike."""
        replace_parameter(layer, "weight", run_time_weight(layer.get_parameter("weight").data).t())
        pairs = mx.pair_exponents(layer.get_parameter("weight_scale").data)
        replace_parameter(layer, "weight_scale", pairs.transpose(0, 1))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """Two operators: quantise, multiply."""
        codes, x_scale = self.quantize_tokens(x.reshape(-1, x.shape[-1]))
        y = mx_multiply(
            codes,
            x_scale,
            tensor_of(layer, "weight"),
            tensor_of(layer, "weight_scale"),
            bias if self.operator_adds_bias else None,
            (self.quantisation["dst_type"] == FLOAT4_E2M1, self.storage.fp4),
            output_dtype=x.dtype,
            group_sizes=self.group_sizes,
        )
        if bias is not None and not self.operator_adds_bias:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
