"""Short forms for the tables of architectures: families, what vLLM needs for each, twins."""

from dataclasses import replace
from typing import Any

import torch
from architectures import Architecture
from torch import Tensor

ROPE_32 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
NO_AUDIO = {"limit_mm_per_prompt": {"audio": 0}}
#: The CPU's rotary operator is wrong for what MLA gives it (shared notes on vLLM, section 1).
NATIVE = {"compilation_config": {"custom_ops": ["none"]}}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 64, "linear_value_head_dim": 64}
#: The decoder of the CPU's MLA is compiled for one size (same place).
MLA = {"num_key_value_heads": 4, "head_dim": 64}
#: vLLM's gated delta rule asserts it on CPU.
BFLOAT16 = {"dtype": "bfloat16"}
DEEPSEEK_V3 = {"hf_overrides": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, **NATIVE}


CLIP = {"patch_size": 14}


def vision_language(model_type: str, name: str, engine: dict[str, Any] | None = None, **config: Any) -> Architecture:
    return Architecture(model_type, f"{name}ForConditionalGeneration", config, {**NO_IMAGES, **(engine or {})})


def causal(model_type: str, name: str, engine: dict[str, Any] | None = None, **config: Any) -> Architecture:
    return Architecture(model_type, f"{name}ForCausalLM", config, engine or {})


def published(architecture: Architecture, values: dict[str, Any]) -> Architecture:
    """With what the published config.json has and transformers no longer writes."""
    return replace(architecture, published=values)


def internlm2(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's tensors as InternLM2 lays them out: for each key head its query heads, the key and the value."""
    if name.endswith("self_attn.q_proj.weight"):
        q, k, v = (
            tensors[name.replace("q_proj", kind)].unflatten(0, (2, -1)) for kind in ("q_proj", "k_proj", "v_proj")
        )
        return {name.replace("self_attn.q_proj", "attention.wqkv"): torch.cat([q, k, v], 1).flatten(0, 1)}
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        return {}
    renames = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    for old, new in renames.items():
        if f".{old}." in f".{name}":
            return {name.replace(old, new): tensors[name]}
    return {name: tensors[name]}
