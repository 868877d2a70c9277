"""Operators of our own for quantised KV caches, `torch.ops.quant_core.*`: what the NPU's have no argument for.

A page holds some tokens of all heads, keys and values in 8 bits: [blocks, kv heads, tokens of a block, D], with any
strides, so that both can be views of one tensor. Scales and offsets are those of checkpoints, one for each channel of
each head: a code is x / scale + offset, a value (code - offset) · scale.

`quantize_to_pages` quantises keys and values [T, kv heads, D] and writes them at slots (block · tokens of a block +
place; below 0: nowhere). `attend_pages` attends to what is stored there. Both work under torch.compile. On an NPU they
are composed of the NPU's operators.
"""

import functools

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
    """See quant_core.ops.cpu.attend.

    Args:
        query: [T, heads, D], floating.
        key_pages: [blocks, kv heads, tokens of a block, D]: int8, float8_e4m3fn or floating.
        value_pages: the same, with a D of their own.
        k_scale: [kv heads, D] float32; None for pages of floats.
        k_offset: the same, subtracted from codes; None for 0.
        v_scale: as of the keys.
        v_offset: as of the keys.
        block_table: [B, blocks of a sequence] int32.
        query_start: [B + 1] int32, where the queries of each sequence begin; rows of `out` behind them are left alone.
        seq_lens: [B] int32, tokens that are stored, those of the queries included.
        scale: what scores are multiplied by.
        causal: whether a query sees nothing behind its own position; the last one stands at the last token.
        window: how many tokens a query sees, its own included (as many behind it if not causal); -1 for all.
        softcap: scores become softcap · tanh(score / softcap); 0 for none.
        sinks: [heads], a score that takes its share in the softmax and has no value.
        alibi: [heads], added to scores for each position that a key stands behind the query.
        out: [T, heads, D of values], floating: receives the result.

    """
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


def quantize_to_pages_elsewhere(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    k_scale: Tensor,
    k_offset: Tensor | None,
    v_scale: Tensor,
    v_offset: Tensor | None,
    slots: Tensor,
) -> None:
    """Of the NPU's operators."""
    codes = []
    for rows, pages, scale, offset in (
        (key, key_pages, k_scale, k_offset),
        (value, value_pages, v_scale, v_offset),
    ):
        if pages.dtype == torch.int8:
            zero_points = None if offset is None else offset.flatten()
            flat = torch.ops.npu.npu_quantize(rows.flatten(1), scale.flatten(), zero_points, torch.qint8, -1, True)
            codes.append(flat.view(rows.shape))
        else:
            codes.append(cpu_write.codes_of(rows, scale, offset, pages.dtype))
    torch.ops.npu.npu_scatter_pa_kv_cache(
        *codes, key_pages.transpose(1, 2), value_pages.transpose(1, 2), slots, cache_mode="Norm"
    )


def attend_pages_elsewhere(
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
    """By the NPU's operator, which adds offsets and wants scales in the query's dtype.

    Raises:
        NotImplementedError: for what that operator does not have.

    """
    given = {"softcap": softcap or None, "sinks": sinks, "alibi": alibi}
    if unknown := [name for name, what in given.items() if what is not None]:
        raise NotImplementedError(f"attend_pages: the NPU's attention has no {', '.join(unknown)}")

    def as_taken(values: Tensor | None, sign: int = 1) -> Tensor | None:
        return None if values is None else (sign * values).to(query.dtype)[:, None]

    bounds: dict[str, int] = {}
    if window > 0:  # a query's own position is not counted there
        bounds = {"pre_tokens": window - 1, "next_tokens": 0 if causal else window - 1}
    mode = 4 if bounds else 3 if causal else 0
    queries = int(query_start[-1])
    result, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query[:queries],
        key_pages,
        value_pages,
        atten_mask=_hidden(query.device) if mode else None,
        actual_seq_lengths=query_start[1:].tolist(),
        actual_seq_lengths_kv=seq_lens.tolist(),
        key_antiquant_scale=as_taken(k_scale),
        key_antiquant_offset=as_taken(k_offset, -1),
        value_antiquant_scale=as_taken(v_scale),
        value_antiquant_offset=as_taken(v_offset, -1),
        block_table=block_table,
        num_heads=query.shape[1],
        num_key_value_heads=key_pages.shape[1],
        scale=scale,
        input_layout="TND",
        sparse_mode=mode,
        block_size=key_pages.shape[2],
        **bounds,
    )
    out[:queries] = result


@functools.cache
def _hidden(device: torch.device) -> Tensor:
    """The mask that modes 3 and 4 of the NPU's attention want, whatever the lengths are."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)


def register() -> None:
    """Define the operators."""
    on_cpu = {"quantize_to_pages": cpu_write.quantize_to_pages, "attend_pages": attend_pages_on_cpu}
    elsewhere = {"quantize_to_pages": quantize_to_pages_elsewhere, "attend_pages": attend_pages_elsewhere}
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, on_cpu[name], "CPU")
        _library.impl(name, elsewhere[name], "CompositeExplicitAutograd")
        _library.impl(name, lambda *_: None, "Meta")  # nothing is returned
