"""Fake functions: what torch_npu's Meta kernels return, and what our kernels do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_calls
import expert_calls
import pytest
import torch
from operator_calls import CALLS, DECODED, E8M0, bf16, f8, f16, f32, i8, int4, ones, operator_of, u8, x
from torch._subclasses.fake_tensor import FakeTensorMode

npu = torch.ops.npu

EVERY = CALLS | DECODED | expert_calls.CALLS | expert_calls.DECODED | attention_calls.CALLS

REAL = json.loads((Path(__file__).parent / "torch_npu_schemas.json").read_text())["meta_samples"]


META_CALLS: dict[str, Callable[[], Any]] = {
    **expert_calls.META_CALLS,
    "npu_kronecker_quant: bf16 (4,8,16) dst int32": lambda: npu.npu_kronecker_quant(
        x(4, 8, 16), x(8, 8), x(16, 16), dst_dtype=torch.int32
    ),
    "npu_kronecker_quant: bf16 (4,8,16) dst None": lambda: npu.npu_kronecker_quant(x(4, 8, 16), x(8, 8), x(16, 16)),
    "npu_quant_matmul: int4 (4,8)i32 @ (32,8)i32.t() [k=64,n=32]": lambda: npu.npu_quant_matmul(
        int4(4, 8), int4(32, 8).t(), ones(32), pertoken_scale=ones(4), output_dtype=bf16
    ),
    "npu_quant_matmul: int4 (4,8)i32 @ (64,4)i32 [k=64,n=32]": lambda: npu.npu_quant_matmul(
        int4(4, 8), int4(64, 4), ones(32), pertoken_scale=ones(4), output_dtype=bf16
    ),
    "npu_weight_quant_batchmatmul: bf16 (4,64) int4 i32 (64,4)": lambda: npu.npu_weight_quant_batchmatmul(
        x(4, 64), int4(64, 4), ones(32, dtype=bf16)
    ),
    "npu_weight_quant_batchmatmul: bf16 (4,64) int4 i32 (32,8).t()": lambda: npu.npu_weight_quant_batchmatmul(
        x(4, 64), int4(32, 8).t(), ones(32, dtype=bf16)
    ),
    "npu_quantize: bf16 (4,64) qint8 div_mode False": lambda: npu.npu_quantize(
        x(4, 64), ones(64), None, torch.qint8, -1, False
    ),
    "npu_quantize: bf16 (4,64) quint4x2 div_mode False": lambda: npu.npu_quantize(
        x(4, 64), ones(64), None, torch.quint4x2, -1, False
    ),
    "npu_quantize: f32 (4,64) quint8 div_mode True": lambda: npu.npu_quantize(
        x(4, 64, dtype=f32), ones(1), None, torch.quint8, -1, True
    ),
    "npu_dynamic_quant: bf16 (4,64) dst_type None": lambda: npu.npu_dynamic_quant(x(4, 64)),
    "npu_dynamic_quant: bf16 (4,64) dst_type int8": lambda: npu.npu_dynamic_quant(x(4, 64), dst_type=torch.int8),
    "npu_dynamic_quant: bf16 (4,64) dst_type quint4x2": lambda: npu.npu_dynamic_quant(
        x(4, 64), dst_type=torch.quint4x2
    ),
    "npu_dynamic_quant: bf16 (2,4,64)": lambda: npu.npu_dynamic_quant(x(2, 4, 64)),
    "npu_dynamic_quant_asymmetric: bf16 (4,64)": lambda: npu.npu_dynamic_quant_asymmetric(x(4, 64)),
    "npu_dynamic_quant_asymmetric: bf16 (4,64) quint4x2": lambda: npu.npu_dynamic_quant_asymmetric(
        x(4, 64), dst_type=torch.quint4x2
    ),
    "npu_quant_matmul: int8 (4,64)@(64,32) scale f32(32) pertoken f32(4) out bf16": lambda: npu.npu_quant_matmul(
        i8(4, 64),
        i8(64, 32),
        ones(32),
        pertoken_scale=ones(4),
        output_dtype=bf16,
    ),
    "npu_quant_matmul: int8 output_dtype None": lambda: npu.npu_quant_matmul(i8(4, 64), i8(64, 32), ones(32)),
    "npu_quant_matmul: int8 output_dtype int32": lambda: npu.npu_quant_matmul(
        i8(4, 64), i8(64, 32), ones(32), output_dtype=torch.int32
    ),
    "npu_quant_matmul: int8 batch (2,4,64)@(64,32)": lambda: npu.npu_quant_matmul(
        i8(2, 4, 64), i8(64, 32), ones(32), output_dtype=bf16
    ),
    "npu_trans_quant_param: f32 (32)": lambda: npu.npu_trans_quant_param(ones(32)),
    "npu_weight_quant_batchmatmul: bf16 (4,64) int8 (64,32)": lambda: npu.npu_weight_quant_batchmatmul(
        x(4, 64), i8(64, 32), ones(32, dtype=bf16)
    ),
    "npu_dynamic_mx_quant: bf16 (4,96) e4m3": lambda: npu.npu_dynamic_mx_quant(x(4, 96), dst_type=torch.float8_e4m3fn),
    "npu_dynamic_mx_quant: bf16 (4,96) default": lambda: npu.npu_dynamic_mx_quant(x(4, 96)),
    "npu_dynamic_mx_quant: bf16 (4,96) fp4 round": lambda: npu.npu_dynamic_mx_quant(
        x(4, 96), dst_type=296, round_mode="round"
    ),
    "npu_dynamic_mx_quant: bf16 (2,96,4) axis=1 e4m3": lambda: npu.npu_dynamic_mx_quant(
        x(2, 96, 4), axis=1, dst_type=torch.float8_e4m3fn
    ),
    "npu_dynamic_dual_level_mx_quant: bf16 (4,1024)": lambda: npu.npu_dynamic_dual_level_mx_quant(x(4, 1024)),
    "npu_kronecker_quant: bf16 (4,8,16) dst fp4": lambda: npu.npu_kronecker_quant(
        x(4, 8, 16), x(8, 8), x(16, 16), dst_dtype=296
    ),
    "npu_quant_matmul: mxfp8 (4,64)e4m3 @ (64,32) scale (1,32,2) pertoken (4,1,2)": lambda: npu.npu_quant_matmul(
        f8(4, 64), f8(64, 32), u8(1, 32, 2), pertoken_scale=u8(4, 1, 2), output_dtype=bf16, **E8M0
    ),
    "npu_quant_matmul: mxfp4 (4,32)u8 @ (32,32)u8.t() [k=64,n=32]": lambda: npu.npu_quant_matmul(
        u8(4, 32),
        u8(32, 32).t(),
        u8(1, 32, 2),
        pertoken_scale=u8(4, 1, 2),
        output_dtype=bf16,
        x1_dtype=296,
        x2_dtype=296,
        **E8M0,
    ),
    "npu_quant_matmul: mxfp4 (4,32)u8 @ (64,16)u8 contiguous [k=64,n=32]": lambda: npu.npu_quant_matmul(
        u8(4, 32),
        u8(64, 16),
        u8(1, 32, 2),
        pertoken_scale=u8(4, 1, 2),
        output_dtype=bf16,
        x1_dtype=296,
        x2_dtype=296,
        **E8M0,
    ),
    "npu_quant_matmul: fp8 per token (4,64)e4m3 @ (64,32)": lambda: npu.npu_quant_matmul(
        f8(4, 64), f8(64, 32), ones(32), pertoken_scale=ones(4), output_dtype=bf16
    ),
    "npu_dynamic_quant: bf16 (4,64) dst_type float8_e4m3fn": lambda: npu.npu_dynamic_quant(
        x(4, 64), dst_type=torch.float8_e4m3fn
    ),
}


def test_every_call_is_compared() -> None:
    assert META_CALLS.keys() == REAL.keys()


@pytest.mark.parametrize("call", REAL)
def test_meta_results_are_those_of_torch_npu(call: str) -> None:
    with torch.device("meta"):
        result = META_CALLS[call]()
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    assert [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors] == REAL[call]


@pytest.mark.parametrize("call", EVERY)
def test_a_fake_result_has_the_shape_dtype_and_strides_of_the_kernel_s(call: str) -> None:
    name, arguments, options = EVERY[call]
    real = operator_of(name)(*arguments, **options)
    mode = FakeTensorMode()
    to_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (arguments, options))
    with mode:
        fake = operator_of(name)(*to_fake[0], **to_fake[1])
    pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real or (), fake or (), strict=True))
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("call", EVERY)
def test_opcheck(call: str) -> None:
    """Schema (nothing mutated, no argument returned), autograd keys, fake tensors, dynamic shapes."""
    name, arguments, options = EVERY[call]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    leaves = torch.utils._pytree.tree_leaves(arguments)
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in leaves):
        checks.remove("test_schema")  # it multiplies the arguments, which torch cannot in FP8
    torch.library.opcheck(operator_of(name), arguments, options, test_utils=checks)


@pytest.mark.parametrize("target", [f32, bf16, f16, torch.int32, torch.int8])
def test_dtype_arguments_work_eager_and_compiled(target: torch.dtype, compile_afresh: Callable[..., Any]) -> None:
    """The schema says int; callers give a torch.dtype."""
    tokens = ones(3) if target.is_floating_point else None

    def quantised(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        codes = npu.npu_quantize(inputs, ones(1) / 16, None, torch.qint8, -1, True)
        again, _ = npu.npu_dynamic_quant(inputs, dst_type=torch.int8)
        return npu.npu_quant_matmul(codes + again, weight, ones(5), pertoken_scale=tokens, output_dtype=target)

    inputs, weight = x(3, 8), i8(5, 8).t()
    eager = quantised(inputs, weight)
    assert eager.dtype == target
    assert torch.equal(compile_afresh(quantised, backend="aot_eager")(inputs, weight), eager)


@pytest.mark.parametrize("default", ["bfloat16", "meta"])
def test_a_default_of_torch_does_not_leak_into_the_kernels(default: str) -> None:
    """Engines set a default dtype and a default device while they build a model."""
    wants = [operator_of(name)(*arguments, **options) for name, arguments, options in EVERY.values()]
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)
        gots = [operator_of(name)(*arguments, **options) for name, arguments, options in EVERY.values()]
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    torch.testing.assert_close(gots, wants, rtol=0, atol=0)
