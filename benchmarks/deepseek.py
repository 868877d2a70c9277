"""A folder that looks like DeepSeek-V3 quantised by msModelSlim: its description and files of its sizes, all holes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 256
HIDDEN, DENSE, EXPERT = 7168, 18432, 2048
# Input and output features of the attention's projections.
ATTENTION = {
    "q_a_proj": (HIDDEN, 1536),
    "q_b_proj": (1536, 24576),
    "kv_a_proj_with_mqa": (HIDDEN, 576),
    "kv_b_proj": (512, 32768),
    "o_proj": (16384, HIDDEN),
}
_FLOAT = {"kv_b_proj"}  # msModelSlim leaves it alone, since the engine multiplies its halves separately
_BYTES = {"I8": 1, "F32": 4, "BF16": 2}

#: Name, dtype as safetensors has it, shape, and type.
Tensor = tuple[str, str, list[int], str]


def tensors(experts: str = "W8A8_DYNAMIC") -> Iterator[Tensor]:
    """All of about 140,000 tensors; experts of another type have more of them."""
    yield "model.embed_tokens.weight", "BF16", [129280, HIDDEN], "FLOAT"
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, (inputs, outputs) in ATTENTION.items():
            quant_type = "FLOAT" if name in _FLOAT else "W8A8_DYNAMIC"
            yield from _linear(f"{prefix}.self_attn.{name}", inputs, outputs, quant_type)
        norms = {"q_a": 1536, "kv_a": 512}
        for name, size in norms.items():
            yield f"{prefix}.self_attn.{name}_layernorm.weight", "BF16", [size], "FLOAT"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", "BF16", [HIDDEN], "FLOAT"
        if layer < DENSE_LAYERS:
            yield from _mlp(f"{prefix}.mlp", DENSE)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", [EXPERTS, HIDDEN], "FLOAT"
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", [EXPERTS], "FLOAT"
        yield from _mlp(f"{prefix}.mlp.shared_experts", EXPERT)
        for expert in range(EXPERTS):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", EXPERT, experts)
    yield "model.norm.weight", "BF16", [HIDDEN], "FLOAT"
    yield "lm_head.weight", "BF16", [129280, HIDDEN], "FLOAT"


def _mlp(prefix: str, size: int, quant_type: str = "W8A8_DYNAMIC") -> Iterator[Tensor]:
    for name in ("gate_proj", "up_proj"):
        yield from _linear(f"{prefix}.{name}", HIDDEN, size, quant_type)
    yield from _linear(f"{prefix}.down_proj", size, HIDDEN, quant_type)


def _linear(module: str, inputs: int, outputs: int, quant_type: str = "W8A8_DYNAMIC") -> Iterator[Tensor]:
    if quant_type == "FLOAT":
        yield f"{module}.weight", "BF16", [outputs, inputs], "FLOAT"
        return
    int4 = quant_type == "W4A8_DYNAMIC"  # per channel: two output features in a byte, and the operator's auxiliary
    yield f"{module}.weight", "I8", [outputs // 2 if int4 else outputs, inputs], quant_type
    yield f"{module}.weight_scale", "F32", [outputs, 1], quant_type
    yield f"{module}.weight_offset", "F32", [outputs, 1], quant_type
    if int4:
        yield f"{module}.scale_bias", "F32", [outputs, 16 if module.endswith("down_proj") else 1], quant_type


def write(folder: Path, files: int = 160, experts: str = "W8A8_DYNAMIC") -> int:
    """Write the folder; how many keys its description has. The files are sparse: their data is never read."""
    every = list(tensors(experts))
    description = {name: quant_type for name, _, _, quant_type in every}
    description |= {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0}
    (folder / "quant_model_description.json").write_text(json.dumps(description, indent=2))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    size = -(-len(every) // files)
    for index in range(files):
        name = f"quant_model_weights-{index + 1:05d}-of-{files:05d}.safetensors"
        _write_sparse(folder / name, every[index * size : (index + 1) * size])
    return len(description)


def _write_sparse(path: Path, part: list[Tensor]) -> None:
    header, offset = {}, 0
    for name, dtype, shape, _ in part:
        end = offset + _BYTES[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
