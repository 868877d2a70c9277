"""Tiny speculative drafts for testdata's qwen3 models, and a model with a layer of its own that drafts (MTP).

Random, so what they propose is refused nearly always: that the answers stay those of the target says that the target
is right; whether the draft is, is seen by its weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_modelslim.writer import write_checkpoint

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 128, 384, 4, 2, 32, 512

CONFIG: dict[str, Any] = {
    "model_type": "llama", "dtype": "float32", "hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": HEAD,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": 1, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip

#: The last components of the linear layers' names.
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc"}


def eagle(folder: Path, tokenizer: Path) -> Path:
    """A draft of one layer that gets the target's last hidden state, and shares its embedding and head."""
    tensors = {**_layer("layers.0"), "fc.weight": _random(HIDDEN, 2 * HIDDEN)}
    del tensors["layers.0.input_layernorm.weight"]  # vLLM's draft has none in its first layer
    return _write(folder, tensors, {**CONFIG, "architectures": ["LlamaForCausalLM"]}, tokenizer)


def eagle3(folder: Path, tokenizer: Path) -> Path:
    """A draft of one layer that gets hidden states of three layers of the target, with a head of its own."""
    tensors = {
        **_layer("midlayer", inputs=2 * HIDDEN),
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "fc.weight": _random(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _random(VOCABULARY, HIDDEN),
    }
    config = {**CONFIG, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCABULARY}
    return _write(folder, tensors, config, tokenizer)


def mtp(folder: Path, tokenizer: Path) -> Path:
    """A model of two layers, and a third one in the same files that drafts (MiMo)."""
    tensors = {
        "model.embed_tokens.weight": _random(VOCABULARY, HIDDEN) * 6,
        "lm_head.weight": _random(VOCABULARY, HIDDEN) * 3,
        "model.norm.weight": torch.ones(HIDDEN),
        "model.mtp_layers.0.input_proj.weight": _random(HIDDEN, 2 * HIDDEN),
    }
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"model.mtp_layers.0.{name}.weight"] = torch.ones(HIDDEN)
    for prefix in ("model.layers.0", "model.layers.1", "model.mtp_layers.0"):
        tensors |= _layer(prefix)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.bias"] = (
                0.1 * _random(len(tensors[f"{prefix}.self_attn.{name}.weight"]), 1).flatten()
            )
    config = {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_hidden_layers": 2}
    return _write(folder, tensors, {**CONFIG, **config, "num_nextn_predict_layers": 1}, tokenizer)


def quantised(folder: Path, target: Path, chosen: Callable[[str], bool] = lambda _: True) -> Path:
    """A checkpoint made from a folder, whose chosen linear layers are W8A8_DYNAMIC."""

    def choose(module: str, _: Tensor) -> str:
        return "W8A8_DYNAMIC" if module.rpartition(".")[2] in LINEAR and chosen(module) else "FLOAT"

    write_checkpoint(target, load_file(folder / "model.safetensors"), choose, files_from=folder)
    return target


def _random(outs: int, ins: int) -> Tensor:
    """Rows of norm near one. From torch's own generator: whoever makes a model seeds it."""
    return torch.randn(outs, ins) / ins**0.5


def _layer(prefix: str, inputs: int = HIDDEN) -> dict[str, Tensor]:
    """The tensors of a decoder layer, whose attention may get more than the hidden state."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, inputs),
        "self_attn.k_proj": (KV_HEADS * HEAD, inputs),
        "self_attn.v_proj": (KV_HEADS * HEAD, inputs),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {f"{prefix}.{name}.weight": _random(*shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{prefix}.{name}.weight": torch.ones(HIDDEN) for name in norms}


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
