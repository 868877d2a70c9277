"""Writing the linear layers of a tiny model in the ways in which types store what belongs to a row."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import architectures
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import StoredForm, WeightForm
from quant_core.packing import pack_pairs
from quant_core.storage import IntegerStorage
from quant_modelslim.writer import quantize_weight, write_checkpoint

GROUP = 32
DESCRIPTION = "quant_model_description.json"


def asymmetric(weight: Tensor) -> dict[str, Tensor]:
    """int8 with a scale and an offset per output feature, neighbouring rows having different ones."""
    scale = weight.abs().amax(1, keepdim=True) / 120
    offset = (torch.arange(len(weight)) % 13 - 6)[:, None]
    codes = (weight / scale).round() + offset
    return {"weight": codes.to(torch.int8), "weight_scale": scale, "weight_offset": offset.float()}


def static(weight: Tensor) -> dict[str, Tensor]:
    """int8 for inputs that are multiples of 1/64, so that unit vectors quantise exactly."""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return {
        "weight": codes,
        "input_scale": torch.tensor([1 / 64]),
        "input_offset": torch.tensor([5.0]),
        "deq_scale": scale / 64,
        "quant_bias": -5 * codes.sum(1, dtype=torch.int32),
    }


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


#: The type, how a weight is stored (None as the writer does), and the largest number that a weight gets.
WAYS: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]] | None, int]] = {
    "W8A8 static": ("W8A8", static, 127),
    "W8A8_DYNAMIC": ("W8A8_DYNAMIC", None, 127),
    "W8A16 asymmetric": ("W8A16", asymmetric, 120),
    "W8A16 groups": ("W8A16", lambda weight: grouped(weight, 8), 127),
    "W4A16": ("W4A16", None, 7),
    "W4A16 groups": ("W4A16", lambda weight: grouped(weight, 4), 7),
    "W4A8_DYNAMIC": ("W4A8_DYNAMIC", None, 7),
    "W4A8_DYNAMIC two stages": ("W4A8_DYNAMIC", two_stages, 7),
}


def make(folder: Path, architecture: architectures.Architecture, way: str) -> None:
    """A float checkpoint and one whose attention and MLP projections are stored this way."""
    quant_type, store, _ = WAYS[way]
    tiny = architectures.make(architecture, folder)
    source = load_file(folder / "float" / "model.safetensors")
    weights = {name: source[f"{name}.weight"].float() for name in tiny.expected}
    chosen = "W8A16" if store else quant_type
    write_checkpoint(
        folder / "quant", source, lambda module, _: chosen if module in weights else "FLOAT", folder / "float"
    )
    if store is None:
        return
    file, description = folder / "quant" / "quant_model_weights.safetensors", folder / "quant" / DESCRIPTION
    replaced = {f"{module}.{suffix}" for module in weights for suffix in ("weight", "weight_scale", "weight_offset")}
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in replaced}
    types = dict.fromkeys(tensors, "FLOAT")
    for module, weight in weights.items():
        stored = {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in store(weight).items()}
        bias = f"{module}.bias"
        if quant_type == "W8A8" and bias in tensors:  # kept inside, in units of deq_scale
            inside = tensors[bias].float() / stored[f"{module}.deq_scale"]
            stored[f"{module}.quant_bias"] += inside.round().to(torch.int32)
        tensors |= stored
        types |= dict.fromkeys(stored, quant_type)
    save_file(tensors, file, {"format": "pt"})
    description.write_text(json.dumps({**types, "version": "1.0.0"}))


def make_experts(folder: Path, architecture: architectures.Architecture) -> int:
    """A checkpoint whose routed experts are W8A16, and a float one with the dequantised weights; how many modules.

    Returns:
        how many projections of experts were quantised; 0 where they are not saved one by one.

    """
    tiny = architectures.make(architecture, folder)
    shutil.rmtree(folder / "quant")
    chosen = {
        name.removesuffix(".weight")
        for name, tensor in tiny.tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and _is_of_expert(name)
    }
    stored = {module: quantize_weight(module, tiny.tensors[f"{module}.weight"], "W8A16") for module in chosen}
    write_checkpoint(
        folder / "quant",
        tiny.tensors,
        lambda module, _: "W8A16" if module in chosen else "FLOAT",
        files_from=folder / "float",
    )
    exact = {
        f"{module}.weight": parts["weight"].float() * parts["weight_scale"].float() for module, parts in stored.items()
    }
    for file in (folder / "float").glob("*.safetensors*"):
        file.unlink()
    float_tensors = {n: t.contiguous().clone() for n, t in (tiny.tensors | exact).items()}
    save_file(float_tensors, folder / "float" / "model.safetensors", {"format": "pt"})
    return len(chosen)


def _is_of_expert(name: str) -> bool:
    """Whether a tensor is one expert's: a number follows the component that all experts share."""
    components = name.split(".")
    return any(a == "experts" and b.isdecimal() for a, b in itertools.pairwise(components))
