"""Small checkpoints of this format, from dictionaries: the section, and the tensors as the specification lists them."""

import json
import struct
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, HEADS, VOCABULARY, EXPERTS = 128, 256, 64, 48, 3

#: Output and input features of the linear layers of a block.
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HEADS, HIDDEN),
    "self_attn.v_proj": (HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
#: The same of an expert.
EXPERT_SIZES = {"gate_proj": (HEADS, HIDDEN), "up_proj": (HEADS, HIDDEN), "down_proj": (HIDDEN, HEADS)}

Arguments = dict[str, Any]


# --- the section ------------------------------------------------------------------------------------------------------


def arguments(num_bits: int = 8, strategy: str = "channel", **changed: Any) -> Arguments:
    """Arguments with the keys that a writer never leaves out."""
    usual = {"type": "int", "symmetric": True, "group_size": None, "dynamic": False}
    return {"num_bits": num_bits, "strategy": strategy, **usual, **changed}


INT8 = arguments()
INT4 = arguments(4)
INT8_TOKEN = arguments(strategy="token", dynamic=True)
INT8_STATIC = arguments(strategy="tensor")
FP8 = arguments(type="float")
FP8_TOKEN = arguments(strategy="token", dynamic=True, type="float")
FP8_STATIC = arguments(strategy="tensor", type="float")
FP8_BLOCK = arguments(strategy="block", block_structure=[128, 128], type="float")
FP8_GROUP_128 = arguments(strategy="group", group_size=128, dynamic=True, type="float")
MXFP8 = arguments(strategy="group", group_size=32, type="float", scale_dtype="torch.uint8")
MXFP4 = arguments(4, strategy="group", group_size=32, type="float", scale_dtype="torch.uint8")
NVFP4 = arguments(4, strategy="tensor_group", group_size=16, type="float", scale_dtype="torch.float8_e4m3fn")


def grouped(args: Arguments, size: int = 32) -> Arguments:
    """The same arguments, by group."""
    return {**args, "strategy": "group", "group_size": size}


def asymmetric(args: Arguments) -> Arguments:
    """The same arguments, with zero points."""
    return {**args, "symmetric": False}


def at_run_time(args: Arguments) -> Arguments:
    """The same arguments for inputs whose scales are found at run time."""
    return {**args, "dynamic": "local" if args["strategy"] == "tensor_group" else True}


def group(
    weights: Arguments | None = INT8,
    inputs: Arguments | None = INT8_TOKEN,
    targets: Iterable[str] = ("Linear",),
    **more: Any,
) -> dict[str, Any]:
    """One of `config_groups`."""
    given = {"weights": weights, "input_activations": inputs, "output_activations": None, "targets": list(targets)}
    return deepcopy({**given, **more})


def section(*groups: dict[str, Any], ignore: Iterable[str] = ("lm_head",), **more: Any) -> dict[str, Any]:
    """A section with these groups, named `group_0` and so on."""
    named = {f"group_{index}": entry for index, entry in enumerate(groups or [group()])}
    usual = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    return {**usual, "version": "0.17.0", "config_groups": named, "ignore": list(ignore), **more}


# --- tensors ----------------------------------------------------------------------------------------------------------


def stored(
    weights: Arguments = INT8,
    inputs: Arguments | None = INT8_TOKEN,
    size: tuple[int, int] = (HIDDEN, HIDDEN),
    packed: bool | None = None,
) -> dict[str, Tensor]:
    """What a module of such a group holds, by section 4 of the specification; all codes are zero.

    Args:
        weights: arguments.
        inputs: arguments.
        size: output and input features.
        packed: integers in words; None does what the writer does without being told otherwise.

    """
    (outputs, inputs_size), bits = size, weights["num_bits"]
    rows, columns = _scales(weights, outputs, inputs_size)
    tensors: dict[str, Tensor] = {}
    if weights["type"] == "float" and bits == 4:
        tensors["weight_packed"] = torch.zeros(outputs, inputs_size // 2, dtype=torch.uint8)
    elif weights["type"] == "float":
        tensors["weight"] = torch.zeros(outputs, inputs_size, dtype=torch.float8_e4m3fn)
    elif packed if packed is not None else inputs is None:
        words = -(-inputs_size * bits // 32)
        tensors["weight_packed"] = torch.zeros(outputs, words, dtype=torch.int32)
        tensors["weight_shape"] = torch.tensor([outputs, inputs_size])
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = torch.zeros(-(-rows * bits // 32), columns, dtype=torch.int32)
    else:
        tensors["weight"] = torch.zeros(outputs, inputs_size, dtype=torch.int8)
        if not weights["symmetric"]:
            tensors["weight_zero_point"] = torch.zeros(rows, columns, dtype=torch.int8)
    tensors["weight_scale"] = _ones(weights, rows, columns)
    if weights["strategy"] == "tensor_group":
        tensors["weight_global_scale"] = torch.ones(1)
    return tensors | _of_inputs(inputs)


def _scales(weights: Arguments, outputs: int, inputs: int) -> tuple[int, ...]:
    """Rows and columns of the scales."""
    if weights["strategy"] == "tensor":
        return 1, 0
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        return -(-outputs // rows), -(-inputs // columns)
    return outputs, 1 if weights["strategy"] == "channel" else -(-inputs // weights["group_size"])


def _ones(weights: Arguments, rows: int, columns: int) -> Tensor:
    shape = (rows, columns) if columns else (1,)
    kinds = {"torch.uint8": torch.uint8, "torch.float8_e4m3fn": torch.float8_e4m3fn}
    dtype = kinds.get(weights.get("scale_dtype") or "", torch.bfloat16)
    return torch.full(shape, 127 if dtype == torch.uint8 else 1, dtype=dtype)


def _of_inputs(inputs: Arguments | None) -> dict[str, Tensor]:
    if inputs is None or inputs["dynamic"] is True:
        return {}
    if inputs["dynamic"] == "local":
        return {"input_global_scale": torch.ones(1)}
    zero_point = {} if inputs["symmetric"] else {"input_zero_point": torch.zeros(1, dtype=torch.int8)}
    return {"input_scale": torch.ones(1, dtype=torch.bfloat16), **zero_point}


# --- folders ----------------------------------------------------------------------------------------------------------


@dataclass
class Content:
    """What a folder holds, before it is written.

    Attributes:
        tensors: name to value.
        config: of config.json.

    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> dict[str, Any]:
        """The section of config.json."""
        return self.config["quantization_config"]

    def group(self, name: str = "group_0") -> dict[str, Any]:
        """One of its groups."""
        return self.section["config_groups"][name]

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of all that a module has."""
        self.drop(module)
        self.tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def put_float(self, module: str, size: tuple[int, int] | None = None) -> None:
        """Let a module be stored in float."""
        shape = size or SIZES[".".join(module.split(".")[-2:])]
        self.put(module, {"weight": torch.ones(shape, dtype=torch.bfloat16)})

    def drop(self, module: str) -> None:
        """Remove a module."""
        self.tensors = {name: value for name, value in self.tensors.items() if name.rpartition(".")[0] != module}

    def write(self, folder: Path, weights: str = "model.safetensors") -> Path:
        """Write config.json and one file of weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / weights)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def content(*groups: dict[str, Any], layers: int = 2, packed: bool | None = None, **more: Any) -> Content:
    """A model whose linear layers are all stored as the first group says, its head and embeddings in float."""
    found = Content(config={"model_type": "qwen3", "quantization_config": section(*groups, **more)})
    first = found.group()
    for name in ("model.embed_tokens", "lm_head"):
        found.put_float(name, (VOCABULARY, HIDDEN))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found.put(f"{prefix}.input_layernorm", {"weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
        for name, size in SIZES.items():
            found.put(f"{prefix}.{name}", stored(first["weights"], first["input_activations"], size, packed))
    return found


def with_experts(
    found: Content, weights: Arguments = INT8, inputs: Arguments | None = INT8_TOKEN, layer: int = 1
) -> Content:
    """The mlp of one layer replaced by experts and a router."""
    prefix = f"model.layers.{layer}.mlp"
    for name in ("gate_proj", "up_proj", "down_proj"):
        found.drop(f"{prefix}.{name}")
    found.put_float(f"{prefix}.gate", (EXPERTS, HIDDEN))
    for expert in range(EXPERTS):
        for name, size in EXPERT_SIZES.items():
            found.put(f"{prefix}.experts.{expert}.{name}", stored(weights, inputs, size))
    return found


_SPELLED = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = tuple(_SPELLED)

Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_headers(path: Path, headers: Headers, values: Mapping[str, tuple[int, ...]] = {}) -> None:
    """A file of zeros with these headers, which takes no room however large its tensors are.

    Args:
        path: of the file.
        headers: dtype and shape by name.
        values: of a few tensors of int64.

    """
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in headers.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SPELLED[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
        for name, numbers in values.items():
            opened.seek(8 + len(text) + header[name]["data_offsets"][0])
            opened.write(struct.pack(f"<{len(numbers)}q", *numbers))
