"""Half a billion random parameters, written as ModelSlim and, the same codes, as vLLM's own path takes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_modelslim.writer import quantize_tensors, write_checkpoint

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def tensors() -> dict[str, Tensor]:
    """The float model."""
    hidden, inner, key = CONFIG["hidden_size"], CONFIG["intermediate_size"], 128
    sizes = {"q_proj": hidden, "k_proj": key, "v_proj": key}
    found = {"model.embed_tokens.weight": torch.randn(CONFIG["vocab_size"], hidden) / 50}
    for layer in range(CONFIG["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, size in sizes.items():
            found[f"{attention}.{name}.weight"] = torch.randn(size, hidden) / 30
            found[f"{attention}.{name}.bias"] = torch.zeros(size)
        found[f"{attention}.o_proj.weight"] = torch.randn(hidden, hidden) / 30
        for name in ("gate_proj", "up_proj"):
            found[f"{mlp}.{name}.weight"] = torch.randn(inner, hidden) / 30
        found[f"{mlp}.down_proj.weight"] = torch.randn(hidden, inner) / 70
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
    found["model.norm.weight"] = torch.ones(hidden)
    return {name: tensor.to(torch.bfloat16) for name, tensor in found.items()}


def _choose(module: str, weight: Tensor) -> str:
    return "W8A8_DYNAMIC" if module.endswith("_proj") else "FLOAT"


def write_both(folder: Path) -> dict[str, Path]:
    """One folder for each."""
    made = {"ModelSlim": folder / "modelslim", "compressed-tensors": folder / "compressed"}
    floats = tensors()
    write_checkpoint(made["ModelSlim"], floats, _choose)
    (made["ModelSlim"] / "config.json").write_text(json.dumps(CONFIG))
    stored, _ = quantize_tensors(floats, _choose)
    made["compressed-tensors"].mkdir()
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("weight_offset")}
    save_file(kept, made["compressed-tensors"] / "model.safetensors", metadata={"format": "pt"})
    config = {**CONFIG, "quantization_config": COMPRESSED}
    (made["compressed-tensors"] / "config.json").write_text(json.dumps(config))
    return made
