"""Modules that are fused in the checkpoint already, in every way in which their weight is packed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import StoredForm, WeightForm
from quant_core.packing import pack_pairs
from quant_core.storage import IntegerStorage
from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures

#: It fuses q, k and v, and gate and up.
PHI3 = architectures.Architecture("phi3", "Phi3ForCausalLM")
GROUP = 32
DESCRIPTION = "quant_model_description.json"


def grouped(weight: Tensor, num_bits: int) -> dict[str, Tensor]:
    """A weight with scales of groups; int4 with two output features to a byte, as msModelSlim's older writer packs."""
    form = WeightForm(num_bits=num_bits, strategy="group", group_size=GROUP, symmetric=False)
    stored = IntegerStorage(StoredForm(), form).quantize(weight)
    return {**stored, "weight": pack_pairs(stored["weight"], 0)} if num_bits == 4 else stored


def two_stages(weight: Tensor) -> dict[str, Tensor]:
    """int4 in two stages, packed along the output features."""
    form = WeightForm(num_bits=4, strategy="group", group_size=GROUP, outer="channel", offset_type="int")
    stored = IntegerStorage(StoredForm(), form).quantize(weight)
    second = {f"{name}_second": stored[name] for name in ("weight_scale", "weight_offset")}
    first = {name: stored[name.replace("weight", "weight_channel")] for name in ("weight_scale", "weight_offset")}
    return {"weight": pack_pairs(stored["weight"], 0), **first, **second}


#: How a linear weight is stored by type; None as the writer does.
TYPES: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]] | None, int]] = {
    "W8A8_DYNAMIC": ("W8A8_DYNAMIC", None, 127),
    "W8A16 groups": ("W8A16", lambda weight: grouped(weight, 8), 127),
    "W4A16": ("W4A16", None, 7),
    "W4A16 groups": ("W4A16", lambda weight: grouped(weight, 4), 7),
    "W4A8_DYNAMIC": ("W4A8_DYNAMIC", None, 7),
    "W4A8_DYNAMIC two stages": ("W4A8_DYNAMIC", two_stages, 7),
}


def make(folder: Path, kind: str) -> dict[str, Tensor]:
    """A checkpoint of this kind, and the float weights of its linear layers by module."""
    quant_type, store, _ = TYPES[kind]
    model = architectures.build(PHI3)
    model.save_pretrained(folder / "float")
    exact = {n.removesuffix(".weight"): t for n, t in model.state_dict().items() if "_proj.weight" in n}
    chosen = "W8A16" if store else quant_type
    write_checkpoint(
        folder / "quant", model.state_dict(), lambda m, _: chosen if m in exact else "FLOAT", folder / "float"
    )
    if store is None:
        return exact
    file, described = folder / "quant" / "quant_model_weights.safetensors", folder / "quant" / DESCRIPTION
    tensors = {n: t for n, t in load_file(file).items() if n.rpartition(".")[0] not in exact}
    types = dict.fromkeys(tensors, "FLOAT")
    for module, weight in exact.items():
        stored = {f"{module}.{suffix}": tensor for suffix, tensor in store(weight).items()}
        tensors |= {name: tensor.contiguous() for name, tensor in stored.items()}
        types |= dict.fromkeys(stored, quant_type)
    save_file(tensors, file)
    described.write_text(json.dumps({**types, "version": "1.0.0"}))
    return exact


@pytest.mark.parametrize("kind", TYPES)
def test_its_parts_are_where_they_belong(kind: str, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Each layer multiplies by the float weight up to half a step, seen from outside: unit vectors quantise exactly."""
    exact = make(tmp_path, kind)
    maximum = TYPES[kind][2]
    with load_model(tmp_path / "quant", skip_tokenizer_init=True) as model:
        for module, weight in exact.items():
            layer = model.get_submodule(module)
            found = layer.quant_method.apply(layer, torch.eye(weight.shape[1])).t()
            step = weight.abs().amax(1, keepdim=True) / maximum
            assert bool(((found - weight).abs() <= 0.52 * step + 0.02 * weight.abs()).all()), module
