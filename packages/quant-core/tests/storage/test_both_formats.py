"""The same numbers as msModelSlim and compressed-tensors store them become the same tensors at run time, bit for bit.

W8A8, whose writers fold differently, has the same in schemes/linear/test_w8a8_unfolded.py.
"""

from typing import Any

import pytest
import torch
from bits import pack_pairs
from integer_modules import NIBBLES, SYMMETRIC_TOKENS, exact_weight, integers
from stating import Stated
from torch import Tensor

from quant_core import ActivationForm, get_scheme_class
from quant_core.devices import planned_device

INPUTS, SIZES = 512, (24, 8)

TOKENS: dict[str, ActivationForm | None] = {
    "W8A8_DYNAMIC": SYMMETRIC_TOKENS,
    "W4A8_DYNAMIC": SYMMETRIC_TOKENS,
    "W4A4_DYNAMIC": NIBBLES,
    "W8A16": None,
    "W4A16": None,
}


def as_modelslim(quant_type: str, module: Stated) -> dict[str, Tensor]:
    """Zero points as floats and zero where there are none, two int4 to a byte where that tool packs."""
    codes, offset, _ = exact_weight(module)
    scale, weight = module["weight_scale"], codes.to(torch.int8)
    groups = scale.shape[1]
    offsets = offset[:, :: INPUTS // groups].to(scale.dtype)
    if quant_type == "W4A16":
        weight = pack_pairs(weight, 1 if groups == 1 else 0)
    elif quant_type == "W4A8_DYNAMIC":
        weight = pack_pairs(weight, 0)
    return {"weight": weight, "weight_scale": scale, "weight_offset": offsets}


#: Zero points only of the types that that tool writes with some.
FORMS = [(name, False) for name in TOKENS] + [(name, True) for name, tokens in TOKENS.items() if tokens is None]


@pytest.mark.parametrize(("quant_type", "asymmetric"), FORMS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "910B"])
def test_the_same_run_time_tensors(
    workbench: Any,
    quant_type: str,
    groups: int,
    asymmetric: bool,
    packed: bool,
    stored_dtype: torch.dtype,
    device: str,
) -> None:
    """And the same outputs, of a fused layer."""
    scheme_class, tokens = get_scheme_class(quant_type, "linear"), TOKENS[quant_type]
    options: dict[str, Any] = {"asymmetric": asymmetric, "packed": packed, "model": stored_dtype, "tokens": tokens}
    strategy, num_bits = "channel" if groups == 1 else "group", int(quant_type[1])
    ours = [integers(out, INPUTS, num_bits, strategy, groups, **options) for out in SIZES]
    theirs = [as_modelslim(quant_type, module) for module in ours]
    with planned_device(device):
        scheme, layer = workbench.serve(scheme_class, ours, dtype=torch.bfloat16)
        other, usual = workbench.serve(scheme_class, theirs, dtype=torch.bfloat16, inputs=INPUTS, sizes=SIZES)
    held, expected = dict(layer.named_parameters()), dict(usual.named_parameters())
    # That tool stores zeros beside symmetric weights, which a weight-only product then adds.
    assert expected.keys() - held.keys() == ({"weight_offset"} if tokens is None and not asymmetric else set())
    for name, value in held.items():
        assert torch.equal(value, expected[name]), name
        assert (value.dtype, value.stride()) == (expected[name].dtype, expected[name].stride()), name
    x = torch.randn(5, INPUTS).to(torch.bfloat16)
    assert torch.equal(scheme.apply(layer, x), other.apply(usual, x))
