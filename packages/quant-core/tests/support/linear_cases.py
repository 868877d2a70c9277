"""Stored modules of every linear type in every form, as checkpoints have them."""

import torch
from bits import pack_pairs
from case import Case, Stored
from float_cases import FLOAT_CASES
from integer_modules import ASYMMETRIC_TOKENS, TOKENS, integers, unfolded
from mx_modules import dual_scale, mxfp4, mxfp4_flatquant, mxfp8, wfp8afp8
from torch import Tensor

from quant_core import ActivationForm
from quant_core.schemes.linear.w4a4_dynamic import AscendW4A4DynamicLinearMethod
from quant_core.schemes.linear.w4a4_flatquant_dynamic import AscendW4A4FlatQuantDynamicLinearMethod, get_decompose_dim
from quant_core.schemes.linear.w4a4_mxfp4 import AscendW4A4MXFP4LinearMethod
from quant_core.schemes.linear.w4a4_mxfp4_dualscale import AscendW4A4MXFP4DualScaleLinearMethod
from quant_core.schemes.linear.w4a4_mxfp4_flatquant import AscendW4A4MXFP4FlatQuantLinearMethod
from quant_core.schemes.linear.w4a8_dynamic import AscendW4A8DynamicLinearMethod
from quant_core.schemes.linear.w4a8_mxfp import AscendW4A8MXFPLinearMethod
from quant_core.schemes.linear.w4a16 import AscendW4A16LinearMethod
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.linear.w8a8_mix import AscendW8A8MixLinearMethod
from quant_core.schemes.linear.w8a8_mxfp8 import AscendW8A8MXFP8LinearMethod
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.linear.wfp8afp8_dynamic import AscendW8A8FP8DynamicLinearMethod


def int8(*shape: int) -> Tensor:
    """Random codes with the largest of both signs among them."""
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    values.flatten()[:2] = torch.tensor([127, -128], dtype=torch.int8)[: values.numel()]
    return values


def w8a8(
    out: int,
    inputs: int,
    input_scale: float = 0.02,
    input_offset: float = -7.0,
    deq: torch.dtype = torch.float32,
    model: torch.dtype = torch.float32,
    weight_scale: bool = False,
) -> Stored:
    """A W8A8 module; `model` is the dtype in which older writers store scales."""
    scale = torch.rand(out, 1) / 100 + 1e-3
    deq_scale = scale.flatten() * input_scale
    stored = {
        "weight": int8(out, inputs),
        "input_scale": torch.tensor([input_scale]).to(model),
        "input_offset": torch.tensor([input_offset]).to(model),
        "deq_scale": deq_scale.view(torch.int32).to(torch.int64) if deq == torch.int64 else deq_scale,
        "quant_bias": torch.randint(-9000, 9000, (out,), dtype=torch.int32),
    }
    if weight_scale:
        stored |= {"weight_scale": scale.to(model), "weight_offset": torch.zeros(out, 1, dtype=model)}
    return stored


def w8a8_dynamic(
    out: int, inputs: int, model: torch.dtype = torch.float32, offset: bool = True, groups: int = 1
) -> Stored:
    """A W8A8_DYNAMIC module."""
    stored = {"weight": int8(out, inputs), "weight_scale": (torch.rand(out, groups) / 100 + 1e-3).to(model)}
    return stored | ({"weight_offset": torch.zeros(out, groups, dtype=model)} if offset else {})


def w8a8_mix(out: int, inputs: int) -> Stored:
    """A W8A8_MIX module: both types' tensors."""
    return {**w8a8(out, inputs, weight_scale=True)}


def w8a16(
    out: int,
    inputs: int,
    groups: int = 1,
    asymmetric: bool = False,
    model: torch.dtype = torch.float32,
    offset: bool = True,
) -> Stored:
    """A W8A16 module."""
    stored = {"weight": int8(out, inputs), "weight_scale": (torch.rand(out, groups) / 100 + 1e-3).to(model)}
    values = torch.randint(-100, 100, (out, groups)) if asymmetric else torch.zeros(out, groups)
    return stored | ({"weight_offset": values.to(model)} if offset else {})


def int4(*shape: int) -> Tensor:
    """Random codes, one to a byte, with the largest of both signs among them."""
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    values.flatten()[:2] = torch.tensor([7, -8], dtype=torch.int8)[: values.numel()]
    return values


def w4a16(
    out: int,
    inputs: int,
    groups: int = 1,
    asymmetric: bool = False,
    model: torch.dtype = torch.float32,
    packed: bool = True,
    offset: bool = True,
) -> Stored:
    """A W4A16 module, packed along the input features if its scales are per channel, else along the output features."""
    values = torch.randint(-5, 5, (out, groups)) if asymmetric else torch.zeros(out, groups)
    codes = int4(out, inputs)
    return {
        "weight": pack_pairs(codes, 1 if groups == 1 else 0) if packed else codes,
        "weight_scale": (torch.rand(out, groups) / 10 + 1e-2).to(model),
        **({"weight_offset": values.to(model)} if offset else {}),
    }


def w4a4_dynamic(out: int, inputs: int, groups: int = 1, model: torch.dtype = torch.float32) -> Stored:
    """A W4A4_DYNAMIC module."""
    scale = (torch.rand(out, groups) / 10 + 1e-2).to(model)
    return {"weight": int4(out, inputs), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def w4a8_dynamic(out: int, inputs: int, groups: int = 0, packed: bool = True, parts: int = 1) -> Stored:
    """A W4A8_DYNAMIC module; with groups it has a second stage, without parts no scale_bias."""
    codes, first = int4(out, inputs), torch.rand(out, 1) / 10 + 1e-2
    stored = {
        "weight": pack_pairs(codes, 0) if packed else codes,
        "weight_scale": first,
        "weight_offset": torch.zeros_like(first),
    }
    second = torch.rand(out, groups) + 0.5 if groups else torch.ones(out, 1)
    if groups:
        stored |= {"weight_channel_scale": first, "weight_channel_offset": torch.zeros_like(first)}
        stored |= {"weight_scale": second, "weight_offset": torch.zeros(second.shape, dtype=torch.int64)}
    if parts:
        weight = codes * (first * second).repeat_interleave(inputs // second.shape[1], dim=1)
        stored["scale_bias"] = 8 * weight.unflatten(1, (parts, -1)).sum(dim=-1)
    return stored


def flatquant(out: int, inputs: int, clip_ratio: float | None = None, right: bool = True) -> Stored:
    """A W4A4_FLATQUANT_DYNAMIC module: the clip ratio is its own, the matrices those of all with so many inputs."""
    generator = torch.Generator().manual_seed(inputs)
    sizes = get_decompose_dim(inputs)
    matrices = [torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.contiguous() for size in sizes]
    stored = {
        "weight": torch.randint(-8, 8, (out, inputs), dtype=torch.int8),
        "weight_scale": torch.rand(out, 1) / 100 + 1e-3,
        "weight_offset": torch.zeros(out, 1),
        "left_trans": matrices[0],
        "clip_ratio": torch.tensor([1 - out / 1000 if clip_ratio is None else clip_ratio]),
    }
    return stored | ({"right_trans": matrices[1]} if right else {})


BF16, F16 = torch.bfloat16, torch.float16
Static, Dynamic, WeightOnly = AscendW8A8LinearMethod, AscendW8A8DynamicLinearMethod, AscendW8A16LinearMethod
Int4WeightOnly, Int4Dynamic, Mixed = (
    AscendW4A16LinearMethod,
    AscendW4A4DynamicLinearMethod,
    AscendW4A8DynamicLinearMethod,
)
FP8, DualScale, FlatQuantMX = (
    AscendW8A8FP8DynamicLinearMethod,
    AscendW4A4MXFP4DualScaleLinearMethod,
    AscendW4A4MXFP4FlatQuantLinearMethod,
)
NPU, MX_NPU = "910B", "950"

CASES = {
    "W8A8": Case(Static, w8a8),
    "W8A8 bf16": Case(Static, w8a8, BF16),
    "W8A8 distinct input scales": Case(Static, w8a8, distinct_scales=True),
    "W8A8 int64": Case(Static, lambda *a, **o: w8a8(*a, deq=torch.int64, **o), F16),
    "W8A8 int64 served in bf16": Case(Static, lambda *a, **o: w8a8(*a, deq=torch.int64, **o), BF16),
    "W8A8 legacy": Case(Static, lambda *a, **o: w8a8(*a, model=BF16, weight_scale=True, **o), BF16, True),
    "W8A8 unfolded": Case(Static, unfolded, BF16),
    "W8A8 unfolded fp32": Case(Static, unfolded),
    "W8A8 unfolded fp16": Case(Static, lambda *a, **o: unfolded(*a, asymmetric=True, model=F16, **o), F16),
    "W8A8 unfolded asymmetric": Case(Static, lambda *a, **o: unfolded(*a, asymmetric=True, **o), BF16, True),
    "W8A8 unfolded per tensor": Case(Static, lambda *a, **o: unfolded(*a, "tensor", scalar=True, **o), BF16, True),
    "W8A8_DYNAMIC": Case(Dynamic, w8a8_dynamic),
    "W8A8_DYNAMIC fp16": Case(Dynamic, w8a8_dynamic, F16),
    "W8A8_DYNAMIC legacy": Case(Dynamic, lambda *a: w8a8_dynamic(*a, model=BF16, offset=False), BF16),
    "W8A8_DYNAMIC groups": Case(Dynamic, lambda out, inputs: w8a8_dynamic(out, inputs, groups=inputs // 16)),
    "W8A8_DYNAMIC per tensor": Case(Dynamic, lambda o, i: integers(o, i, strategy="tensor", tokens=TOKENS), BF16),
    "W8A8_DYNAMIC scalar, int32": Case(
        Dynamic, lambda o, i: integers(o, i, strategy="tensor", scalar=True, packed=True, tokens=TOKENS)
    ),
    "W8A8_DYNAMIC asymmetric weights": Case(Dynamic, lambda o, i: integers(o, i, asymmetric=True, tokens=TOKENS), BF16),
    "W8A8_DYNAMIC asymmetric inputs": Case(Dynamic, lambda o, i: integers(o, i, tokens=ASYMMETRIC_TOKENS), BF16),
    "W8A8_DYNAMIC all asymmetric": Case(
        Dynamic,
        lambda o, i: integers(o, i, 8, "group", i // 16, asymmetric=True, packed=True, tokens=ASYMMETRIC_TOKENS),
    ),
    "W8A8_MIX": Case(AscendW8A8MixLinearMethod, w8a8_mix, BF16),
    "W4A4_FLATQUANT_DYNAMIC": Case(AscendW4A4FlatQuantDynamicLinearMethod, flatquant, error=0.15),
    "W4A4_FLATQUANT_DYNAMIC bf16": Case(AscendW4A4FlatQuantDynamicLinearMethod, flatquant, BF16, error=0.15),
    "W4A4_FLATQUANT_DYNAMIC left only": Case(
        AscendW4A4FlatQuantDynamicLinearMethod, lambda *a: flatquant(*a, right=False), F16, error=0.15
    ),
    "W8A16": Case(WeightOnly, w8a16),
    "W8A16 bf16": Case(WeightOnly, w8a16, BF16),
    "W8A16 without offset": Case(WeightOnly, lambda *a: w8a16(*a, offset=False), F16),
    "W8A16 asymmetric": Case(WeightOnly, lambda *a: w8a16(*a, asymmetric=True, model=BF16), BF16),
    "W8A16 groups": Case(WeightOnly, lambda out, inputs: w8a16(out, inputs, inputs // 16)),
    "W8A16 asymmetric groups": Case(WeightOnly, lambda out, inputs: w8a16(out, inputs, inputs // 16, True), F16),
    "W4A16": Case(Int4WeightOnly, w4a16),
    "W4A16 asymmetric": Case(Int4WeightOnly, lambda *a: w4a16(*a, asymmetric=True, model=BF16), BF16),
    "W4A16 groups": Case(Int4WeightOnly, lambda out, inputs: w4a16(out, inputs, inputs // 16, offset=False), F16),
    "W4A16 unpacked groups": Case(Int4WeightOnly, lambda o, i: w4a16(o, i, i // 16, True, packed=False), BF16),
    "W4A16 int32": Case(Int4WeightOnly, w4a16, BF16, device=NPU),
    "W4A16 int32 groups": Case(Int4WeightOnly, lambda o, i: w4a16(o, i, i // 16, True), F16, device=NPU),
    "W8A16 per tensor, int32": Case(
        WeightOnly, lambda o, i: integers(o, i, strategy="tensor", scalar=True, packed=True), BF16
    ),
    "W8A16 int32 asymmetric groups": Case(
        WeightOnly, lambda o, i: integers(o, i, 8, "group", i // 16, asymmetric=True, packed=True), BF16
    ),
    "W8A16 indexed": Case(WeightOnly, lambda o, i: integers(o, i, 8, "group", i // 16, indexed=True)),
    "W4A16 int32 asymmetric": Case(Int4WeightOnly, lambda o, i: integers(o, i, 4, asymmetric=True, packed=True), BF16),
    "W4A16 indexed": Case(
        Int4WeightOnly,
        lambda o, i: integers(o, i, 4, "group", i // 16, asymmetric=True, packed=True, indexed=True),
        BF16,
        device=NPU,
    ),
    "W4A4_DYNAMIC": Case(Int4Dynamic, w4a4_dynamic, error=0.2),
    "W4A4_DYNAMIC groups": Case(Int4Dynamic, lambda o, i: w4a4_dynamic(o, i, i // 16, BF16), BF16, error=0.2),
    "W4A4_DYNAMIC int32": Case(Int4Dynamic, w4a4_dynamic, BF16, device=NPU, error=0.2),
    "W4A4_DYNAMIC groups on an NPU": Case(Int4Dynamic, lambda o, i: w4a4_dynamic(o, i, 2), F16, device=NPU, error=0.2),
    "W4A4_DYNAMIC asymmetric": Case(
        Int4Dynamic,
        lambda o, i: integers(o, i, 4, asymmetric=True, packed=True, tokens=ActivationForm(num_bits=4)),
        BF16,
        device=NPU,
        error=0.2,
    ),
    "W4A8_DYNAMIC": Case(Mixed, w4a8_dynamic),
    "W4A8_DYNAMIC per tensor": Case(Mixed, lambda o, i: integers(o, i, 4, "tensor", tokens=TOKENS), BF16, device=NPU),
    "W4A8_DYNAMIC all asymmetric": Case(
        Mixed,
        lambda o, i: integers(o, i, 4, "group", i // 16, asymmetric=True, packed=True, tokens=ASYMMETRIC_TOKENS),
        BF16,
        device=NPU,
    ),
    "W4A8_DYNAMIC two stages": Case(Mixed, lambda o, i: w4a8_dynamic(o, i, i // 16, parts=16), BF16),
    "W4A8_DYNAMIC unpacked": Case(Mixed, lambda o, i: w4a8_dynamic(o, i, i // 16, packed=False, parts=0), F16),
    "W4A8_DYNAMIC int32": Case(Mixed, lambda o, i: w4a8_dynamic(o, i, parts=i), BF16, device=NPU),
    "W4A8_DYNAMIC two stages int32": Case(Mixed, lambda o, i: w4a8_dynamic(o, i, 2, parts=16), F16, device=NPU),
    "WFP8AFP8_DYNAMIC": Case(FP8, wfp8afp8, error=0.05),
    "WFP8AFP8_DYNAMIC bf16": Case(FP8, lambda *a: wfp8afp8(*a, model=BF16, offset=False), BF16, error=0.05),
    "WFP8AFP8_DYNAMIC on an NPU": Case(FP8, wfp8afp8, BF16, device=MX_NPU, error=0.05),
    "W8A8_MXFP8": Case(AscendW8A8MXFP8LinearMethod, mxfp8, error=0.05),
    "W8A8_MXFP8 bf16": Case(AscendW8A8MXFP8LinearMethod, mxfp8, BF16, error=0.05),
    "W8A8_MXFP8 on an NPU": Case(AscendW8A8MXFP8LinearMethod, mxfp8, BF16, device=MX_NPU, error=0.05),
    "W4A8_MXFP": Case(AscendW4A8MXFPLinearMethod, mxfp4, F16, error=0.05),
    "W4A8_MXFP on an NPU": Case(AscendW4A8MXFPLinearMethod, mxfp4, F16, device=MX_NPU, error=0.05),
    "W4A4_MXFP4": Case(AscendW4A4MXFP4LinearMethod, mxfp4, error=0.2),
    "W4A4_MXFP4 bf16": Case(AscendW4A4MXFP4LinearMethod, mxfp4, BF16, error=0.2),
    "W4A4_MXFP4 on an NPU": Case(AscendW4A4MXFP4LinearMethod, mxfp4, BF16, device=MX_NPU, error=0.2),
    "W4A4_MXFP4_DUALSCALE": Case(DualScale, dual_scale, error=0.2),
    "W4A4_MXFP4_DUALSCALE on an NPU": Case(DualScale, dual_scale, BF16, device=MX_NPU, error=0.2),
    "W4A4_MXFP4_DUALSCALE groups on an NPU": Case(
        DualScale, lambda o, i: dual_scale(o, i, max(1, i // 64)), F16, device=MX_NPU, error=0.2
    ),
    "W4A4_MXFP4_DUALSCALE groups": Case(DualScale, lambda o, i: dual_scale(o, i, max(1, i // 64)), BF16, error=0.2),
    "W4A4_MXFP4_FLATQUANT": Case(FlatQuantMX, lambda *a: mxfp4_flatquant(*a, flatquant(*a)), error=0.2),
    "W4A4_MXFP4_FLATQUANT on an NPU": Case(
        FlatQuantMX, lambda *a: mxfp4_flatquant(*a, flatquant(*a)), BF16, device=MX_NPU, error=0.2
    ),
    "W4A4_MXFP4_FLATQUANT left only": Case(
        FlatQuantMX, lambda *a: mxfp4_flatquant(*a, flatquant(*a, right=False)), BF16, error=0.2
    ),
    **FLOAT_CASES,
}
