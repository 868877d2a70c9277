"""Stored modules with floating weights as llm-compressor writes them, with what their format states."""

from collections.abc import Callable

import torch
from mx_modules import fp8
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, WeightForm

BF16 = torch.bfloat16

FP8 = {
    "channel": WeightForm(type="float"),
    "tensor": WeightForm(type="float", strategy="tensor"),
    "block": WeightForm(type="float", strategy="block", block_structure=(6, 24)),
}
STATIC = ActivationForm(type="float", dynamic=False, strategy="tensor")
TOKENS = ActivationForm(type="float")


def fp8_scale(
    out: int, inputs: int, strategy: str, model: torch.dtype = BF16, block: tuple[int, int] = (6, 24)
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
) -> Stated:
    """FP8 weights without an offset."""
    stored = {"weight": fp8(out, inputs), "weight_scale": fp8_scale(out, inputs, strategy, model)}
    return Stated(stored, FP8["tensor" if strategy == "scalar" else strategy], activation)


def fp8_static(
    out: int, inputs: int, strategy: str = "tensor", model: torch.dtype = BF16, input_scale: float = 0.01
) -> Stated:
    """A WFP8AFP8 module."""
    module = fp8_module(out, inputs, strategy, STATIC, model)
    module["input_scale"] = torch.full(() if strategy == "scalar" else (1,), input_scale).to(model)
    return module


#: How the experts of a type are made, by outputs and inputs.
EXPERT_MODULES: dict[str, Callable[[int, int], Stated]] = {
    "WFP8AFP8_DYNAMIC tensor": lambda o, i: fp8_module(o, i, "tensor", TOKENS),
    "WFP8AFP8": fp8_static,
    "WFP8AFP8 scalar": lambda o, i: fp8_static(o, i, "scalar", input_scale=0.02),
}

#: Of these, those whose ranks of tensor parallelism add up to one rank's result.
SUMMED = ("WFP8AFP8", "WFP8AFP8 scalar")
