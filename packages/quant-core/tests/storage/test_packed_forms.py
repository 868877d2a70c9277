"""The same int4 numbers, however they are stored, become the same tensors at run time, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import flatquant, int4
from torch import Tensor

from quant_core import AscendLinearScheme, LinearContext, Packing, list_schemes
from quant_core.devices import planned_device
from quant_core.packing import pack, unpack
from quant_core.schemes.verify import verify_stored

OUT, INPUTS = 24, 512

PACKINGS = {
    "unpacked": None,
    "pairs along in": Packing(1),
    "pairs along out": Packing(0),
    "pairs along in, offset binary": Packing(1, signed=False),
    "eights along in": Packing(1, values=8),
    "eights along in, offset binary": Packing(1, values=8, signed=False),
    "eights along out, offset binary": Packing(0, values=8, signed=False),
}

TYPES = {
    name: cls
    for (name, kind), cls in list_schemes().items()
    if issubclass(cls, AscendLinearScheme) and cls.stores and (cls.stores.num_bits, cls.stores.type) == (4, "int")
}


def test_these_are_all_int4_types() -> None:
    assert sorted(TYPES) == [
        "W4A16",
        "W4A4_DYNAMIC",
        "W4A4_FLATQUANT_DYNAMIC",
        "W4A8_DYNAMIC",
        "W4AFP8_DYNAMIC",
    ]


def module(scheme_class: type[AscendLinearScheme], codes: Tensor, packing: Packing | None, groups: int) -> Any:
    """The stored tensors, and what a format states of them; the offsets of asymmetric types are packed alike."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randint(-5, 5, (OUT, groups), generator=generator).to(torch.int8)
    asymmetric = not scheme_class.stores.symmetric
    packed = packing is not None and packing.values == 8 and packing.axis == 0 and asymmetric
    stored = {
        "weight": pack(codes, packing),
        "weight_scale": torch.rand(OUT, groups, generator=generator) / 10 + 1e-2,
        "weight_offset": pack(offsets, packing if packed else None) if asymmetric else torch.zeros(OUT, groups),
    }
    weight = replace(scheme_class.stores, packing=packing, offset_packing=packing if packed else None)
    weight = replace(weight, offset_type="int" if asymmetric else "float")
    if groups > 1:
        weight = replace(weight, strategy="group", group_size=INPUTS // groups)
    if scheme_class is TYPES["W4A4_FLATQUANT_DYNAMIC"]:
        stored |= {name: t for name, t in flatquant(OUT, INPUTS).items() if name not in stored}
    return stored, weight


def run_time(workbench: Any, scheme_class: Any, codes: Tensor, packing: Packing | None, groups: int) -> Any:
    """Parameters of the processed layer, and the dequantised weight."""
    stored, weight = module(scheme_class, codes, packing, groups)
    context: LinearContext = workbench.context([stored], torch.bfloat16, sizes=(OUT,), inputs=INPUTS)
    context = replace(context, stored=(replace(context.stored[0], weight=weight),))
    assert context.form.sizes() == (INPUTS, OUT)
    assert scheme_class.can_serve(context) == []
    scheme = scheme_class.create(context)
    verify_stored(scheme)
    layer = workbench.load(scheme, [stored])
    exact = scheme.dequantize(layer)
    scheme.process_weights_after_loading(layer)
    return dict(layer.named_parameters()), exact


@pytest.mark.parametrize("device", ["cpu", "910B"])
@pytest.mark.parametrize("packing", list(PACKINGS)[1:])
@pytest.mark.parametrize(
    ("quant_type", "groups"),
    [(name, groups) for name, cls in TYPES.items() for groups in ((1, 2) if "group" in cls.strategies else (1,))],
)
def test_the_same_run_time_tensors(workbench: Any, quant_type: str, packing: str, groups: int, device: str) -> None:
    scheme_class, codes = TYPES[quant_type], int4(OUT, INPUTS)
    with planned_device(device):
        plain, exact = run_time(workbench, scheme_class, codes, None, groups)
        packed, found = run_time(workbench, scheme_class, codes, PACKINGS[packing], groups)
    assert plain.keys() == packed.keys()
    for name in plain:
        assert torch.equal(plain[name], packed[name]), name
        assert plain[name].stride() == packed[name].stride()
    assert torch.equal(exact, found)


@pytest.mark.parametrize(("num_bits", "count"), [(4, 2), (4, 8), (8, 4)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("signed", [True, False])
def test_offset_binary_is_the_value_plus_half_of_the_range(num_bits: int, count: int, axis: Any, signed: bool) -> None:
    """By arithmetic on single values, as compressed-tensors packs them: the first in the lowest bits."""
    values = torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), (8, 16), dtype=torch.int8)
    packing = Packing(axis, values=count, signed=signed)
    packed = pack(values, packing, num_bits)
    assert torch.equal(unpack(packed, packing, num_bits), values)
    rows = values if axis == 1 else values.t()
    whole = rows.to(torch.int64) + (0 if signed else 2 ** (num_bits - 1))
    shifts = num_bits * torch.arange(count)
    fields = (whole % 2**num_bits).unflatten(1, (-1, count)) << shifts
    expected = fields.sum(-1) if axis == 1 else fields.sum(-1).t()
    assert packed.dtype == (torch.int8 if count == 2 else torch.int32)
    assert torch.equal(packed.to(torch.int64) % 2 ** (num_bits * count), expected)
