"""Modules with integer weights as compressed-tensors writes them, with what that format states of them.

Nothing here is the package's: packing is that of bits.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from bits import pack_eights
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, Packing, WeightForm

TOKENS = ActivationForm()
ASYMMETRIC_TOKENS = ActivationForm(symmetric=False)
STATIC = ActivationForm(dynamic=False, strategy="tensor")
ASYMMETRIC_STATIC = replace(STATIC, symmetric=False)


def offset_binary(values: Tensor, num_bits: int, axis: int = 1) -> Tensor:
    """int32 of eight 4-bit or four 8-bit neighbours along an axis: each value plus half of the range."""
    if axis == 0:
        return offset_binary(values.t().contiguous(), num_bits).t().contiguous()
    whole = values.to(torch.int32) + 2 ** (num_bits - 1)
    if num_bits == 4:
        return pack_eights(whole)
    return torch.from_numpy(whole.numpy().astype(np.uint8, order="C").view(np.int32))


def integers(
    out: int,
    inputs: int,
    num_bits: int = 8,
    strategy: Any = "channel",
    groups: int = 1,
    asymmetric: bool = False,
    packed: bool = False,
    model: torch.dtype = torch.bfloat16,
    scalar: bool = False,
    indexed: bool = False,
    tokens: ActivationForm | None = None,
) -> Stated:
    """A module with a random weight.

    Args:
        out: output features.
        inputs: input features.
        num_bits: of a value.
        strategy: what shares a scale.
        groups: of a channel, if that is a group.
        asymmetric: with zero points, packed along the output features where the weight is packed.
        packed: several values to an int32.
        model: dtype of the scales.
        scalar: a value of the whole tensor has no axis.
        indexed: groups are not made of neighbours; equal in all modules with so many inputs.
        tokens: how the input is quantised.

    """
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (out, inputs), dtype=torch.int8)
    codes.flatten()[:2] = torch.tensor([half - 1, -half], dtype=torch.int8)[: codes.numel()]
    shape = {"tensor": () if scalar else (1,), "channel": (out, 1), "group": (out, groups)}[strategy]
    stored = {"weight": offset_binary(codes, num_bits) if packed else codes}
    stored["weight_scale"] = (torch.rand(shape) / half + 1e-3).to(model)
    if asymmetric:
        offsets = torch.randint(-half // 2, half // 2, shape, dtype=torch.int8)
        stored["weight_offset"] = offset_binary(offsets, num_bits, axis=0) if packed else offsets
    if indexed:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        stored["weight_g_idx"] = (order // (inputs // groups)).to(torch.int32)
    count = 32 // num_bits
    weight = WeightForm(
        num_bits=num_bits,
        strategy=strategy,
        group_size=inputs // groups if strategy == "group" else None,
        symmetric=not asymmetric,
        packing=Packing(1, values=count, signed=False) if packed else None,
        offset_type="int",
        offset_packing=Packing(0, values=count, signed=False) if packed and asymmetric else None,
        indexed=indexed,
    )
    return Stated(stored, weight, tokens)


def unfolded(
    out: int,
    inputs: int,
    strategy: str = "channel",
    asymmetric: bool = False,
    model: torch.dtype = torch.bfloat16,
    scalar: bool = False,
    input_scale: float = 0.02,
    input_offset: int = -7,
) -> Stated:
    """A module with int8 weights whose input has a stored scale, and a zero point if it is asymmetric."""
    tokens = ASYMMETRIC_STATIC if asymmetric else STATIC
    module = integers(out, inputs, strategy=strategy, model=model, scalar=scalar, tokens=tokens)
    shape = () if scalar else (1,)
    module["input_scale"] = torch.full(shape, input_scale, dtype=model)
    if asymmetric:
        module["input_offset"] = torch.full(shape, input_offset, dtype=torch.int8)
    return module


def exact_weight(module: Stated) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and the zero point and scale of each input feature, float64 [out, in], by the definitions."""
    stated, weight = module.weight, module["weight"]
    codes = _unpacked(weight, stated.num_bits) if stated.packing else weight
    index = module.get("weight_g_idx")
    if index is None:
        index = torch.arange(codes.shape[1]) // (stated.group_size or codes.shape[1])
    offset = module.get("weight_offset", torch.zeros(1))
    if stated.offset_packing:
        offset = _unpacked(offset.t().contiguous(), stated.num_bits).t()

    def of_features(values: Tensor) -> Tensor:
        values = values.to(torch.float64)
        return values[:, index.to(torch.int64)] if values.dim() == 2 else values.expand(codes.shape)

    return codes.to(torch.float64), of_features(offset), of_features(module["weight_scale"])


def _unpacked(packed: Tensor, num_bits: int) -> Tensor:
    count = 32 // num_bits
    fields = [packed.to(torch.int64) // 2 ** (num_bits * place) % 2**num_bits for place in range(count)]
    return torch.stack(fields, dim=-1).flatten(-2) - 2 ** (num_bits - 1)
