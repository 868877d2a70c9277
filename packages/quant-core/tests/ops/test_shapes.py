"""Fake functions: what torch_npu's Meta kernels return, and what our kernels do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

npu = torch.ops.npu

REAL = json.loads((Path(__file__).parent / "torch_npu_schemas.json").read_text())["meta_samples"]


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A floating input."""
    return torch.randn(shape).to(dtype)


def i8(*shape: int) -> torch.Tensor:
    """An int8 operand."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales."""
    return torch.ones(shape, dtype=dtype)


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32

META_CALLS: dict[str, Callable[[], Any]] = {
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
}


@pytest.mark.parametrize("call", REAL)
def test_meta_results_are_those_of_torch_npu(call: str) -> None:
    with torch.device("meta"):
        result = META_CALLS[call]()
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    assert [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors] == REAL[call]


#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "quantize": ("npu_quantize", (x(3, 8), ones(1), ones(1), torch.qint8, -1, True), {}),
    "quantize uint8": ("npu_quantize", (x(2, 3, 8), ones(8), None, torch.quint8, -1, False), {}),
    "quantize transposed": ("npu_quantize", (x(8, 3).t(), ones(1), None, torch.qint8, -1), {}),
    "quantize a slice": ("npu_quantize", (x(8, 16)[:, 4:12], ones(8), None, torch.qint8, -1), {}),
    "quantize a permutation": ("npu_quantize", (x(2, 3, 4).permute(2, 0, 1), ones(1), None, torch.qint8, -1), {}),
    "dynamic": ("npu_dynamic_quant", (x(3, 8),), {}),
    "dynamic 3-D": ("npu_dynamic_quant", (x(2, 3, 8, dtype=f32),), {"smooth_scales": ones(8)}),
    "dynamic transposed": ("npu_dynamic_quant", (x(8, 3, dtype=f16).t(),), {"dst_type": torch.int8}),
    "matmul bf16": (
        "npu_quant_matmul",
        (i8(3, 8), i8(5, 8).t(), ones(5)),
        {"pertoken_scale": ones(3), "bias": ones(5), "output_dtype": bf16},
    ),
    "matmul int8": ("npu_quant_matmul", (i8(3, 8), i8(8, 5), ones(5)), {"offset": ones(1)}),
    "matmul int32": ("npu_quant_matmul", (i8(3, 8), i8(8, 5), ones(1)), {"output_dtype": torch.int32}),
    "matmul encoded": (
        "npu_quant_matmul",
        (i8(3, 8), i8(8, 5), npu.npu_trans_quant_param(ones(5))),
        {"bias": torch.ones(5, dtype=torch.int32), "output_dtype": f16},
    ),
    "matmul batches": ("npu_quant_matmul", (i8(2, 1, 3, 8), i8(4, 8, 5), ones(5)), {"output_dtype": f32}),
    "encode": ("npu_trans_quant_param", (ones(5),), {}),
    "encode with offset": ("npu_trans_quant_param", (ones(1), ones(5), 1), {}),
    "weight only": (
        "npu_weight_quant_batchmatmul",
        (x(3, 8), i8(5, 8).t(), ones(5, dtype=bf16), ones(5, dtype=bf16)),
        {"bias": ones(5)},
    ),
    "weight only in groups": (
        "npu_weight_quant_batchmatmul",
        (x(2, 3, 8, dtype=f32), i8(8, 5), ones(2, 5)),
        {"antiquant_group_size": 4},
    ),
    "weight only to int8": (
        "npu_weight_quant_batchmatmul",
        (x(3, 8, dtype=f32), i8(8, 5), ones(5), None, ones(1), ones(1)),
        {},
    ),
    "format": ("npu_format_cast", (i8(5, 8).t(), 29), {}),
    "format of a slice": ("npu_format_cast", (i8(5, 8)[:, ::2], 29), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_fake_result_has_the_shape_dtype_and_strides_of_the_kernel_s(call: str) -> None:
    name, arguments, options = CALLS[call]
    real = getattr(npu, name)(*arguments, **options)
    mode = FakeTensorMode()
    to_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (arguments, options))
    with mode:
        fake = getattr(npu, name)(*to_fake[0], **to_fake[1])
    pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake, strict=True))
    for a, b in pairs:
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    """Schema (nothing mutated, no argument returned), autograd keys, fake tensors, dynamic shapes."""
    name, arguments, options = CALLS[call]
    torch.library.opcheck(getattr(npu, name).default, arguments, options)


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
    wants = [getattr(npu, name)(*arguments, **options) for name, arguments, options in CALLS.values()]
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)
        gots = [getattr(npu, name)(*arguments, **options) for name, arguments, options in CALLS.values()]
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    torch.testing.assert_close(gots, wants, rtol=0, atol=0)
