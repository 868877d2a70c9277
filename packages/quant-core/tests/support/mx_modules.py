"""Stored modules of the FP8 and MX types, as checkpoints have them."""

import torch
from torch import Tensor

Stored = dict[str, Tensor]


def fp8(out: int, inputs: int) -> Tensor:
    """Random E4M3 values with the largest of both signs and the smallest among them."""
    values = (torch.randn(out, inputs) * 50).to(torch.float8_e4m3fn)
    values.flatten()[:3] = torch.tensor([448.0, -448.0, 2**-9])[: values.numel()].to(torch.float8_e4m3fn)
    return values


def exponents(out: int, inputs: int, around: int) -> Tensor:
    """Random exponents, one for each block of 32."""
    return torch.randint(around - 2, around + 3, (out, -(-inputs // 32)), dtype=torch.uint8)


def wfp8afp8(out: int, inputs: int, model: torch.dtype = torch.float32, offset: bool = True) -> Stored:
    """A WFP8AFP8_DYNAMIC module."""
    stored = {"weight": fp8(out, inputs), "weight_scale": (torch.rand(out, 1) / 1000 + 1e-4).to(model)}
    return stored | ({"weight_offset": torch.zeros(out, 1, dtype=model)} if offset else {})


def mxfp8(out: int, inputs: int) -> Stored:
    """A W8A8_MXFP8 module."""
    return {"weight": fp8(out, inputs), "weight_scale": exponents(out, inputs, 116)}


def mxfp4(out: int, inputs: int) -> Stored:
    """A W4A8_MXFP or W4A4_MXFP4 module."""
    codes = torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8)
    return {"weight": codes, "weight_scale": exponents(out, inputs, 122)}


def dual_scale(out: int, inputs: int, groups: int = 1) -> Stored:
    """A W4A4_MXFP4_DUALSCALE module."""
    return {**mxfp4(out, inputs), "weight_dual_scale": torch.rand(out, groups, 1) + 0.5}


def mxfp4_flatquant(out: int, inputs: int, transform: Stored) -> Stored:
    """A W4A4_MXFP4_FLATQUANT module with the transform of another FlatQuant module."""
    names = ("left_trans", "right_trans", "clip_ratio")
    return {**mxfp4(out, inputs), **{name: transform[name] for name in names if name in transform}}
