"""Operators of our own for quantised KV caches, `torch.ops.quant_core.*`: what the NPU's have no argument for.

A page holds some tokens of all heads, keys and values in 8 bits: [blocks, kv heads, tokens of a block, D], with any
strides, so that both can be views of one tensor. Scales and offsets are those of checkpoints, one for each channel of
each head: a code is x / scale + offset, a value (code - offset) · scale.

`quantize_to_pages` quantises keys and values [T, kv heads, D] and writes them at slots (block · tokens of a block +
place; below 0: nowhere). `attend_pages` attends to what is stored there. Both work under torch.compile. On an NPU they
are composed of the NPU's operators.
"""

import torch
from torch import Tensor

from quant_core.ops.cpu import attend as cpu_attend
from quant_core.ops.cpu import write as cpu_write

SCHEMAS = {
    "quantize_to_pages": (
        "(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor k_scale, Tensor? k_offset, "
        "Tensor v_scale, Tensor? v_offset, Tensor slots) -> ()"
    ),
    "attend_pages": (
        "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? k_scale, Tensor? k_offset, Tensor? v_scale, "
        "Tensor? v_offset, Tensor block_table, Tensor query_start, Tensor seq_lens, float scale, bool causal, "
        "int window, float softcap, Tensor? sinks, Tensor? alibi, Tensor(a!) out) -> ()"
    ),
}

# Kept for the life of the process: dropping a Library removes what it registered.
_library = torch.library.Library("quant_core", "FRAGMENT")


def attend_pages_on_cpu(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    k_scale: Tensor | None,
    k_offset: Tensor | None,
    v_scale: Tensor | None,
    v_offset: Tensor | None,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    alibi: Tensor | None,
    out: Tensor,
) -> None:
    """Natively where that can be; see quant_core.ops.cpu.attend."""
    cpu_attend.attend(
        query,
        cpu_attend.Codes(key_pages, k_scale, k_offset),
        cpu_attend.Codes(value_pages, v_scale, v_offset),
        block_table,
        query_start,
        seq_lens,
        cpu_attend.rules(scale, causal, window, softcap, sinks, alibi),
        out,
    )


def register() -> None:
    """Define the operators."""
    kernels = {"quantize_to_pages": cpu_write.quantize_to_pages, "attend_pages": attend_pages_on_cpu}
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, kernels[name], "CPU")
        _library.impl(name, lambda *_: None, "Meta")  # nothing is returned
