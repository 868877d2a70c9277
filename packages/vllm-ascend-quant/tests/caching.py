"""Checkpoints with a quantised cache, made from others, and an independent computation of what they answer.

The computation is vLLM's own attention over its own float cache, into which keys and values go rounded as the
checkpoint says: two rounding errors of float32 away from what our pages give.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: What is stored for the cache of one layer: `k_scale`, `k_offset`, `v_scale`, `v_offset`, each [heads, size].
Stored = dict[str, Tensor]

DESCRIPTION = "quant_model_description.json"


def model_of(llm: Any) -> Any:
    """The model of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.get_model()


def attention_layers(llm: Any) -> dict[str, Any]:
    """The attention layers of an engine, by path."""
    from vllm.model_executor.layers.attention import Attention

    return {path: layer for path, layer in model_of(llm).named_modules() if isinstance(layer, Attention)}


def tokens_of_cache(llm: Any) -> int:
    """What vLLM reports as the size of its cache."""
    config = llm.llm_engine.vllm_config.cache_config
    return int(config.num_gpu_blocks * config.block_size)


@contextmanager
def before_writing(change: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While it lasts, vLLM's own attention on CPU writes what `change(layer, keys, values)` makes of a step's."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    # vLLM 0.23 writes in the function that attends.
    apart = hasattr(CPUAttentionBackendImpl, "do_kv_cache_update")
    name = "do_kv_cache_update" if apart else "forward"
    original = getattr(CPUAttentionBackendImpl, name)

    def update(self: Any, layer: Any, key: Tensor, value: Tensor, *rest: Any) -> None:
        original(self, layer, *change(layer, key, value), *rest)

    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, step: Any, **rest: Any
    ) -> Tensor:
        if step is not None:  # vLLM measures memory
            key, value = change(layer, key, value)
        answer: Tensor = original(self, layer, query, key, value, pages, step, **rest)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUAttentionBackendImpl, name, update if apart else forward)
        yield


@contextmanager
def ranges() -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """What keys and values a float engine writes: lowest and highest of each channel, by layer."""
    found: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def look(layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = tuple(of(x, dim=0).float() for x in (key, value) for of in (torch.amin, torch.amax))
        old = found.get(layer.layer_name, new)
        found[layer.layer_name] = tuple(  # type: ignore[assignment]
            (torch.minimum, torch.maximum)[i % 2](a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))
        )
        return key, value

    with before_writing(look):
        yield found


def calibrated(found: tuple[Tensor, Tensor, Tensor, Tensor], *, symmetric: bool = False) -> Stored:
    """Scales and offsets of C8 for such channels, as msModelSlim finds them."""
    stored = {}
    for part, low, high in (("k", *found[:2]), ("v", *found[2:])):
        if symmetric:
            stored[f"{part}_scale"] = torch.maximum(low.abs(), high.abs()).clamp(min=1e-3) / 127
            continue
        scale = (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-3) / 255
        stored[f"{part}_scale"], stored[f"{part}_offset"] = scale, (-128 - low.clamp(max=0) / scale).round()
    return stored


def rounded(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The values of C8, by its formula: (q - offset) · scale, in float64."""
    shift = 0 if offset is None else offset.double()
    codes = (x.double() / scale.double() + shift).round().clamp(-128, 127)
    return ((codes - shift) * scale.double()).to(x.dtype)


@contextmanager
def rounding(caches: dict[str, Stored]) -> Iterator[None]:
    """While it lasts, a float engine rounds the keys and values of these layers as C8 does."""

    def change(layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stored = caches.get(layer.layer_name)
        if stored is None:
            return key, value
        return (
            rounded(key, stored["k_scale"], stored.get("k_offset")),
            rounded(value, stored["v_scale"], stored.get("v_offset")),
        )

    with before_writing(change):
        yield


def put_caches(folder: Path, target: Path, caches: dict[str, Stored]) -> Path:
    """A copy of a ModelSlim folder with C8 caches, by the checkpoint's attention modules."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    (file,) = target.glob("*.safetensors")
    tensors, description = load_file(file), json.loads((target / DESCRIPTION).read_text())
    for module, stored in caches.items():
        for name, value in stored.items():
            part, _, kind = name.partition("_")
            key = f"{module}.{part}_proj.kv_cache_{kind}"
            tensors[key], description[key] = value.flatten().contiguous(), "C8"
    description["kv_cache_type"] = description["kv_quant_type"] = "C8"
    save_file(tensors, file, metadata={"format": "pt"})
    (target / DESCRIPTION).write_text(json.dumps(description))
    return target
