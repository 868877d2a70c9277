"""A small checkpoint in memory, to be changed in every way before it is written, and what it means by the format."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from torch import Tensor

from quant_modelslim.writer import quantize_tensors

# The same examples in every run; `nox -s fuzz` (--hypothesis-profile=fuzz) draws thousands of others. No deadline: the
# first example of a test pays for imports.
unimportant = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", deadline=None, derandomize=True, database=None, max_examples=300, suppress_health_check=unimportant
)
settings.register_profile("fuzz", deadline=None, max_examples=5000, suppress_health_check=unimportant)
settings.load_profile("quick")

HIDDEN, WIDE, HEADS, VOCABULARY = 32, 64, 16, 48

#: An engine's names for fused layers, as vLLM gives them.
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

#: Output and input features of the linear layers.
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HEADS, HIDDEN),
    "self_attn.v_proj": (HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


@dataclass
class Content:
    """What a folder holds, before it is written.

    Attributes:
        tensors: name to value.
        description: the object of the description file.

    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    def write(
        self,
        folder: Path,
        weights: str = "quant_model_weights.safetensors",
        description: str = "quant_model_description.json",
    ) -> Path:
        """Write both files; the names are those of msModelSlim's newest saver unless others are given."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / weights)
        (folder / description).write_text(json.dumps(self.description))
        return folder

    def write_shards(self, folder: Path, count: int, bare_index: bool = False) -> Path:
        """The same cut into files with an index."""
        self.write(folder)
        (folder / "quant_model_weights.safetensors").unlink()
        weight_map = {}
        for i in range(count):
            file = f"quant_model_weights-{i + 1:05d}-of-{count:05d}.safetensors"
            part = dict(list(self.tensors.items())[i::count])
            save_file(part, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        index = weight_map if bare_index else {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def drop(self, name: str) -> None:
        """Remove a tensor and its key."""
        self.tensors.pop(name, None)
        self.description.pop(name, None)

    def modules(self) -> list[str]:
        """The described modules that have a weight."""
        return [key.removesuffix(".weight") for key in self.description if key.endswith(".weight")]


def static_int8(weight: Tensor, bias: Tensor | None, input_scale: float, input_offset: float) -> dict[str, Tensor]:
    """One W8A8 module by the format's formulas."""
    scale = weight.abs().amax(dim=1) / 127
    codes = (weight / scale[:, None]).round().clamp(-128, 127)
    deq_scale = scale * input_scale
    folded = torch.zeros_like(scale) if bias is None else bias / deq_scale
    tensors = {
        "weight": codes.to(torch.int8),
        "input_scale": torch.tensor([input_scale]),
        "input_offset": torch.tensor([input_offset]),
        "deq_scale": deq_scale,
        "quant_bias": (folded - input_offset * codes.sum(dim=1)).round().to(torch.int32),
    }
    return tensors if bias is None else {**tensors, "bias": bias}


def small_content() -> Content:
    """Two layers with every type that a linear layer may have, fused neighbours alike; biases at q, k and v."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    types = {
        "model.layers.0": {"self_attn": "W8A8_DYNAMIC", "mlp": "W8A16"},
        "model.layers.1": {"self_attn": "W8A8", "mlp": "FLOAT"},
    }
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    content = Content()
    for layer, parts in types.items():
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
        for name, (outputs, inputs) in SIZES.items():
            weight, bias = random(outputs, inputs), None
            if name.startswith("self_attn") and not name.endswith("o_proj"):
                bias = random(outputs)
            if parts[name.split(".")[0]] == "W8A8":
                for suffix, value in static_int8(weight, bias, 0.02, 3.0).items():
                    content.tensors[f"{layer}.{name}.{suffix}"] = value
                    content.description[f"{layer}.{name}.{suffix}"] = "FLOAT" if suffix == "bias" else "W8A8"
                continue
            tensors[f"{layer}.{name}.weight"] = weight
            if bias is not None:
                tensors[f"{layer}.{name}.bias"] = bias

    def choose(module: str, _: Tensor) -> str:
        parts = types.get(".".join(module.split(".")[:3]), {})
        return parts.get(module.split(".")[3], "FLOAT") if parts else "FLOAT"

    stored, described = quantize_tensors(tensors, choose)
    content.tensors.update(stored)
    content.description.update(described)
    content.description.update(
        {"model_quant_type": "W8A8", "version": "1.0.0", "group_size": 0, "metadata": {}, "optional": {}}
    )
    return content


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny: threads would only wait for each other, long if the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _small() -> Content:
    return small_content()


@pytest.fixture
def small(_small: Content) -> Content:
    """A sound small checkpoint, to be changed."""
    return deepcopy(_small)


@pytest.fixture(scope="session")
def new_content(_small: Content) -> Callable[[], Content]:
    """Makes one for each example of a property test."""
    return lambda: deepcopy(_small)


@pytest.fixture(scope="session")
def packed_modules() -> dict[str, list[str]]:
    """How an engine fuses."""
    return PACKED
