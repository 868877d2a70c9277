"""Tiny models of many architectures and their ModelSlim checkpoints.

Used by test_architectures.py (a dozen, with every run) and survey.py (all that we know how to make, by hand). Sizes
are small multiples of 32, weights are random but large enough that every layer moves the result.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Components of module names under which everything stays float, as quantisers leave it: towers, projectors, routers.
LEFT_FLOAT = frozenset({
    "vision_tower", "vision_model", "visual", "vision_embed_tokens", "vision_encoder", "vision", "vit_model", "vpm",
    "audio_tower", "audio_model", "audio", "audio_encoder", "embed_vision", "embed_audio", "multi_modal_projector",
    "mm_projector", "connector", "merger", "aligner", "patch_conv", "projector", "encoder_projector", "vqmodel",
    "lm_head", "embed_out", "experts", "gate", "router", "shared_expert_gate", "token2wav", "talker",
    "model_patch_embed",
})  # fmt: skip

#: Sizes for every config attribute that exists under one of these names.
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "ffn_hidden_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "sliding_window": 64, "depth": 2, "embed_dim": 128, "num_heads": 4, "out_hidden_size": 128, "image_size": 56,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "mamba_d_state": 16, "tie_word_embeddings": False, "max_window_layers": 2, "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
}  # fmt: skip


#: A tensor's name, and all tensors, to the twin's tensors that are made at this name.
Rename = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """How to make one tiny model.

    Attributes:
        model_type: transformers' name of the config class.
        model_class: the name of transformers' model class.
        config: what the config gets beside SIZES; dictionaries go to the sub-configs of these names.
        engine: arguments for the engine.
        rename: for a twin that lays the same tensors out otherwise: what it has for a tensor that transformers saves.
        published: what the twin's config.json says instead.
        left_float: components of names under which layers stay float.
    """

    model_type: str
    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    rename: Rename | None = None
    published: dict[str, Any] = field(default_factory=dict)
    left_float: frozenset[str] = LEFT_FLOAT


def small_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """A config of this class with small sizes; sub-configs likewise."""
    default = config_class()
    values = {name: value for name, value in SIZES.items() if _settable(default, name, value)}
    for name, declared in getattr(config_class, "sub_configs", {}).items():
        actual = getattr(default, name, None)
        section = type(actual) if hasattr(actual, "to_dict") else declared
        if hasattr(section, "sub_configs") and section.__name__ != "AutoConfig":
            values[name] = small_config(section, overrides.get(name, {}))
    more = {name: value for name, value in overrides.items() if not hasattr(values.get(name), "to_dict")}
    return config_class(**{**values, **more})


def _settable(config: Any, name: str, value: Any) -> bool:
    try:
        had = hasattr(config, name)
        setattr(config, name, value)
    except Exception:  # properties, and attributes that differ by layer
        return False
    return had


def build(architecture: Architecture, seed: int = 0) -> nn.Module:
    """The float model in transformers."""
    import transformers
    from transformers import CONFIG_MAPPING

    torch.manual_seed(seed)
    config = small_config(CONFIG_MAPPING[architecture.model_type], architecture.config)
    config._attn_implementation = "eager"
    model_class = getattr(transformers, architecture.model_class)
    model = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that matter: rows of linear layers of norm near one, norms and biases off their defaults."""
    done = set()
    for name, module in model.named_modules():
        for kind, param in module.named_parameters(recurse=False):
            if id(param) in done:
                continue
            done.add(id(param))
            if isinstance(module, nn.Linear) and kind == "weight":
                scale = 3.0 if name.endswith("lm_head") else 1.0
                param.normal_(0, scale / param.shape[1] ** 0.5)
            elif isinstance(module, nn.Embedding):
                param.normal_(0, 0.5)
            elif kind == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
                param.normal_(0, 0.1)
            elif param.dim() == 1 and kind == "weight":
                param.add_(torch.randn_like(param) * 0.1)
            elif param.dim() == 3 and "experts" in name.split("."):
                param.normal_(0, 1 / param.shape[-1] ** 0.5)
            elif not torch.isfinite(param).all():
                param.zero_()


@dataclass
class Tiny:
    """A tiny model on disk.

    Attributes:
        model: transformers' model; float until `quantise_reference`.
        tensors: what transformers saves.
        linears: disk module to the path in transformers' model, of layers to be quantised.
        expected: which of the checkpoint's modules are quantised, after renaming.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    linears: dict[str, str]
    expected: set[str] = field(default_factory=set)


def make(architecture: Architecture, folder: Path) -> Tiny:
    """Build a model and write its ModelSlim checkpoint to `folder / "quant"`, its float one to `folder / "float"`."""
    from safetensors.torch import load_file, save_file

    from quant_modelslim.writer import write_checkpoint

    model = build(architecture)
    model.save_pretrained(folder / "float")
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / "float").glob("*.safetensors")):
        tensors |= load_file(file)
    linears = chosen_linears(model, tensors, architecture.left_float)
    quantised = {id(tensors[f"{module}.weight"]) for module in linears}
    if architecture.rename is not None:
        tensors, quantised = renamed(tensors, quantised, architecture.rename)
        for file in (folder / "float").glob("*.safetensors*"):
            file.unlink()
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, folder / "float" / "model.safetensors", {"format": "pt"}
        )
    if architecture.published:
        path = folder / "float" / "config.json"
        path.write_text(json.dumps(merged(json.loads(path.read_text()), architecture.published)))
    chosen = {name.removesuffix(".weight") for name, tensor in tensors.items() if id(tensor) in quantised}
    write_checkpoint(
        folder / "quant",
        tensors,
        lambda module, _: "W8A8_DYNAMIC" if module in chosen else "FLOAT",
        files_from=folder / "float",
    )
    return Tiny(model, tensors, linears, chosen)


def renamed(tensors: dict[str, Tensor], quantised: set[int], rename: Rename) -> tuple[dict[str, Tensor], set[int]]:
    """A twin's tensors, and which of them are quantised: those made from a tensor that is."""
    twin: dict[str, Tensor] = {}
    chosen = set()
    for name, tensor in tensors.items():
        made = rename(name, tensors)
        twin |= made
        chosen |= {id(new) for new in made.values()} if id(tensor) in quantised else set()
    return twin, chosen


def merged(content: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """One object with the keys of both, section by section."""
    return content | {k: merged(content.get(k, {}), v) if isinstance(v, dict) else v for k, v in more.items()}


def chosen_linears(model: nn.Module, tensors: dict[str, Tensor], left_float: frozenset[str]) -> dict[str, str]:
    """Disk module to path of the linear layers to be quantised, found by their values: names may differ on disk."""
    by_value: dict[Any, str] = {}
    for path, module in model.named_modules():
        left = left_float.intersection(path.split("."))
        if isinstance(module, nn.Linear) and not left and module.out_features >= 32:
            by_value[_value(module.weight)] = path
    return {
        name.removesuffix(".weight"): by_value[_value(tensor)]
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and _value(tensor) in by_value
    }


def _value(tensor: Tensor) -> Any:
    return (*tensor.shape, *tensor.detach().flatten()[:6].tolist())
