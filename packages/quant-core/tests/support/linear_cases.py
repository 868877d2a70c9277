"""Stored modules of every linear type in every form, as checkpoints have them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core import AscendLinearScheme
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.linear.w8a8_mix import AscendW8A8MixLinearMethod
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod

Stored = dict[str, Tensor]


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


@dataclass(frozen=True)
class Case:
    """A scheme, a form of its stored tensors, and a model dtype."""

    scheme: type[AscendLinearScheme]
    make: Callable[..., Stored]
    dtype: torch.dtype = torch.float32
    distinct_scales: bool = False

    def members(self, sizes: tuple[int, ...], inputs: int) -> list[Stored]:
        """Stored modules of these output sizes."""
        options = [{"input_scale": 0.02 + 0.01 * i} if self.distinct_scales else {} for i in range(len(sizes))]
        return [self.make(size, inputs, **more) for size, more in zip(sizes, options, strict=True)]


BF16, F16 = torch.bfloat16, torch.float16
Static, Dynamic, WeightOnly = AscendW8A8LinearMethod, AscendW8A8DynamicLinearMethod, AscendW8A16LinearMethod

CASES = {
    "W8A8": Case(Static, w8a8),
    "W8A8 bf16": Case(Static, w8a8, BF16),
    "W8A8 distinct input scales": Case(Static, w8a8, distinct_scales=True),
    "W8A8 int64": Case(Static, lambda *a, **o: w8a8(*a, deq=torch.int64, **o), F16),
    "W8A8 int64 served in bf16": Case(Static, lambda *a, **o: w8a8(*a, deq=torch.int64, **o), BF16),
    "W8A8 legacy": Case(Static, lambda *a, **o: w8a8(*a, model=BF16, weight_scale=True, **o), BF16, True),
    "W8A8_DYNAMIC": Case(Dynamic, w8a8_dynamic),
    "W8A8_DYNAMIC fp16": Case(Dynamic, w8a8_dynamic, F16),
    "W8A8_DYNAMIC legacy": Case(Dynamic, lambda *a: w8a8_dynamic(*a, model=BF16, offset=False), BF16),
    "W8A8_DYNAMIC groups": Case(Dynamic, lambda out, inputs: w8a8_dynamic(out, inputs, groups=inputs // 16)),
    "W8A8_MIX": Case(AscendW8A8MixLinearMethod, w8a8_mix, BF16),
    "W8A16": Case(WeightOnly, w8a16),
    "W8A16 bf16": Case(WeightOnly, w8a16, BF16),
    "W8A16 without offset": Case(WeightOnly, lambda *a: w8a16(*a, offset=False), F16),
    "W8A16 asymmetric": Case(WeightOnly, lambda *a: w8a16(*a, asymmetric=True, model=BF16), BF16),
    "W8A16 groups": Case(WeightOnly, lambda out, inputs: w8a16(out, inputs, inputs // 16)),
    "W8A16 asymmetric groups": Case(WeightOnly, lambda out, inputs: w8a16(out, inputs, inputs // 16, True), F16),
}
