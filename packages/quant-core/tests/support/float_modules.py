"""Stored modules with floating weights as llm-compressor writes them, with what their format states."""

from collections.abc import Callable
from dataclasses import replace

import torch
from bits import pack_eights
from mx_modules import fp8, mxfp4, mxfp8
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, Packing, WeightForm

BF16 = torch.bfloat16

#: So small that tests cut between two of them; the last one of most widths is partial.
BLOCK = (2, 24)

FP8 = {
    "channel": WeightForm(type="float"),
    "tensor": WeightForm(type="float", strategy="tensor"),
    "block": WeightForm(type="float", strategy="block", block_structure=BLOCK),
}
#: Weights that come with MX and NVFP4.
MXFP8 = WeightForm(type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
MXFP4 = replace(MXFP8, num_bits=4, packing=Packing(1))
NVFP4 = replace(MXFP4, group_size=16, scale_dtype=torch.float8_e4m3fn, outer="tensor")

STATIC = ActivationForm(type="float", dynamic=False, strategy="tensor")
TOKENS = ActivationForm(type="float")
GROUPS = ActivationForm(type="float", strategy="group", group_size=128)
NVFP4_INPUT = ActivationForm(
    num_bits=4, type="float", strategy="group", group_size=16, scale_dtype=torch.float8_e4m3fn, outer="tensor"
)


def fp8_scale(
    out: int, inputs: int, strategy: str, model: torch.dtype = BF16, block: tuple[int, int] = BLOCK
) -> Tensor:
    """Random scales in the shape that a strategy has; `scalar` is the older writers' for a tensor."""
    shapes = {
        "channel": (out, 1),
        "tensor": (1,),
        "scalar": (),
        "block": (-(-out // block[0]), -(-inputs // block[1])),
    }
    return (torch.rand(shapes[strategy]) / 1000 + 1e-4).to(model)


def fp8_module(
    out: int,
    inputs: int,
    strategy: str = "channel",
    activation: ActivationForm | None = None,
    model: torch.dtype = BF16,
    block: tuple[int, int] = BLOCK,
) -> Stated:
    """FP8 weights without an offset."""
    stored = {"weight": fp8(out, inputs), "weight_scale": fp8_scale(out, inputs, strategy, model, block)}
    form = FP8["tensor" if strategy == "scalar" else strategy]
    return Stated(stored, replace(form, block_structure=block) if strategy == "block" else form, activation)


def fp8_static(
    out: int, inputs: int, strategy: str = "tensor", model: torch.dtype = BF16, input_scale: float = 0.01
) -> Stated:
    """A WFP8AFP8 module."""
    module = fp8_module(out, inputs, strategy, STATIC, model)
    module["input_scale"] = torch.full(() if strategy == "scalar" else (1,), input_scale).to(model)
    return module


def stated(
    make: Callable[[int, int], dict[str, Tensor]], weight: WeightForm, activation: ActivationForm | None = None
) -> Callable[[int, int], Stated]:
    """Modules that others make too, with what this format states."""
    return lambda out, inputs: Stated(make(out, inputs), weight, activation)


def nvfp4(
    out: int, inputs: int, activation: ActivationForm | None = None, scalar: bool = False, input_scale: float = 0.02
) -> Stated:
    """An NVFP4 module; some groups have a scale of zero."""
    shape = () if scalar else (1,)
    scales = torch.randint(0, 120, (out, inputs // 16), dtype=torch.uint8)
    stored = {
        "weight": torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8),
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.full(shape, 3000.0 + out),
    }
    if activation is not None:
        stored["input_global_scale"] = torch.full(shape, 20 / input_scale)
    return Stated(stored, NVFP4, activation)


def w4afp8(out: int, inputs: int, group: int = 0, asymmetric: bool = False, packed: bool = False) -> Stated:
    """A W4AFP8 module: one value to a byte, or eight to an int32 plus half of their range, offsets likewise."""
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8)
    groups = inputs // group if group else 1
    stored = {"weight": codes, "weight_scale": (torch.rand(out, groups) / 10 + 1e-2).to(BF16)}
    if asymmetric:
        stored["weight_offset"] = torch.randint(-8, 8, (out, groups), dtype=torch.int8)
    if packed:
        stored["weight"] = pack_eights(codes + 8)
        if asymmetric:
            stored["weight_offset"] = pack_eights(stored["weight_offset"].t() + 8).t().contiguous()
    form = WeightForm(
        num_bits=4,
        strategy="group" if group else "channel",
        group_size=group or None,
        symmetric=not asymmetric,
        packing=Packing(1, 8, signed=False) if packed else None,
        offset_type="int",
        offset_packing=Packing(0, 8, signed=False) if packed and asymmetric else None,
    )
    return Stated(stored, form, TOKENS)


#: How the experts of a type are made, by outputs and inputs.
EXPERT_MODULES: dict[str, Callable[[int, int], Stated]] = {
    "WFP8AFP8_DYNAMIC tensor": lambda o, i: fp8_module(o, i, "tensor", TOKENS),
    "WFP8AFP8": fp8_static,
    "WFP8AFP8 scalar": lambda o, i: fp8_static(o, i, "scalar", input_scale=0.02),
    "WFP8A16": fp8_module,
    "WFP8A16 scalar": lambda o, i: fp8_module(o, i, "scalar"),
    "WFP8A16 blocks": lambda o, i: fp8_module(o, i, "block"),
    "WFP8AFP8_BLOCK_DYNAMIC": lambda o, i: fp8_module(o, i, "block", replace(GROUPS, group_size=24)),
    "WFP8AFP8_BLOCK_DYNAMIC per token": lambda o, i: fp8_module(o, i, "block", TOKENS),
    "W8A16_MXFP8": stated(mxfp8, MXFP8),
    "W4A16_MXFP4": stated(mxfp4, MXFP4),
    "W4A16_NVFP4": nvfp4,
    "W4A4_NVFP4": lambda o, i: nvfp4(o, i, NVFP4_INPUT),
    "W4AFP8_DYNAMIC": w4afp8,
    "W4AFP8_DYNAMIC groups": lambda o, i: w4afp8(o, i, 16, asymmetric=True, packed=True),
    "W4A8_MXFP4_FP8_DYNAMIC": stated(mxfp4, MXFP4, GROUPS),
}

#: Of these, those whose ranks of tensor parallelism add up to one rank's result.
SUMMED = ("WFP8AFP8", "WFP8AFP8 scalar", "WFP8A16", "WFP8A16 scalar", "W8A16_MXFP8", "W4A16_NVFP4", "W4A4_NVFP4")
