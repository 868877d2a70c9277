"""Attention over pages of 8-bit keys and values: by native code, or in calls of torch where that cannot be.

In calls of torch, one head of one sequence is dequantised at a time, and only up to the sequence's length: what is
stored behind may be the code of a NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant_core.ops.cpu import native

# Scores that are held at a time.
_SCORES = 2**20


class Codes(NamedTuple):
    """What holds keys or values, and how codes become numbers: (code - offset) · scale.

    Attributes:
        pages: [blocks, kv heads, tokens of a block, D], with any strides: int8, float8_e4m3fn or floating.
        scale: [kv heads, D] float32; None if the values are stored as they are.
        offset: the same; None for 0.

    """

    pages: Tensor
    scale: Tensor | None
    offset: Tensor | None

    def of_head(self, head: int, blocks: Tensor) -> Tensor:
        """The float32 values [tokens, D] of a head in these blocks."""
        pages = self.pages[:, head]
        # Bytes are gathered: torch has no index_select of eight-bit floats.
        one_byte = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
        values = one_byte[blocks].view(pages.dtype).to(torch.float32).flatten(0, 1)
        if self.offset is not None:
            values -= self.offset[head]
        if self.scale is not None:
            values *= self.scale[head]
        return values


class Rules(NamedTuple):
    """What a query attends to, and how scores are changed before the softmax.

    Attributes:
        scale: what scores are multiplied by.
        left: how many keys before its own position a query sees; -1 for all.
        right: how many behind it; 0 is causal, -1 for all.
        softcap: scores become softcap · tanh(score / softcap); 0 for none.
        sinks: [heads], a score for each head that takes its share and has no value.
        alibi: [heads], what is added for each position that a key stands behind the query.

    """

    scale: float
    left: int = -1
    right: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi: Tensor | None = None


def rules(scale: float, causal: bool, window: int, softcap: float, sinks: Tensor | None, alibi: Tensor | None) -> Rules:
    """A window counts the query's own position; without causal it reaches as far behind it."""
    left = window - 1 if window > 0 else -1
    return Rules(scale, left, 0 if causal else left, softcap, sinks, alibi)


def attend(
    query: Tensor,
    keys: Codes,
    values: Codes,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    rules: Rules,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Each query attends to the keys of its own sequence; the last query stands at the sequence's last position.

    Args:
        query: [T, heads, D], floating.
        keys: of D.
        values: of any D of their own.
        block_table: [B, blocks of a sequence] int32: where its tokens are.
        query_start: [B + 1] int32: the queries of each sequence.
        seq_lens: [B] int32: how many tokens of a sequence are stored, those of the queries included.
        rules: what is attended to.
        out: [T, heads, D of values], floating; rows of no sequence are left alone, a query that sees nothing gets 0.
        lse: [T, heads] float32, receives the logarithm of the sum of the exponentials.

    """
    operators = native.operators()
    if operators is None or keys.pages.stride(3) != 1 or values.pages.stride(3) != 1:
        attend_in_torch(query, keys, values, block_table, query_start, seq_lens, rules, out, lse)
        return
    operators.attend.default(query, *_interleaved(keys, values), block_table, query_start, seq_lens, *rules, out, lse)


def _interleaved(keys: Codes, values: Codes) -> tuple[Tensor | None, ...]:
    return (keys.pages, values.pages, keys.scale, keys.offset, values.scale, values.offset)


def attend_in_torch(
    query: Tensor,
    keys: Codes,
    values: Codes,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    rules: Rules,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """The same without native code."""
    starts, block = query_start.tolist(), keys.pages.shape[2]
    group = query.shape[1] // keys.pages.shape[1]
    for sequence, length in enumerate(seq_lens.tolist()):
        start, stop = starts[sequence], starts[sequence + 1]
        position = length - (stop - start)  # of the first query
        first = max(0, position - rules.left) // block if rules.left >= 0 else 0
        blocks = block_table[sequence, first : -(-length // block)].long()
        tokens, rows = length - first * block, slice(start, stop)
        if stop == start or tokens <= 0:
            out[rows] = 0
            if lse is not None:
                lse[rows] = -math.inf
            continue
        for head in range(keys.pages.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            _attend_head(
                query[rows, heads],
                keys.of_head(head, blocks)[:tokens],
                values.of_head(head, blocks)[:tokens],
                position - first * block,
                rules._replace(
                    sinks=None if rules.sinks is None else rules.sinks[heads],
                    alibi=None if rules.alibi is None else rules.alibi[heads],
                ),
                out[rows, heads],
                None if lse is None else lse[rows, heads],
            )


def _attend_head(
    query: Tensor, keys: Tensor, values: Tensor, position: int, rules: Rules, out: Tensor, lse: Tensor | None
) -> None:
    """Queries [n, group, D], the first of them at a position, with keys and values [tokens, D]."""
    n, group, _ = query.shape
    step = max(1, _SCORES // (group * len(keys)))
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        queries = query[part].to(torch.float32)
        scores = (queries * rules.scale) @ keys.t()
        places = torch.arange(len(keys), device="cpu")
        distance = places - torch.arange(position + part.start, position + part.stop, device="cpu")[:, None]
        logits = _masked(scores, distance, rules)
        highest = logits.amax(dim=-1, keepdim=True)
        if rules.sinks is not None:
            highest = torch.maximum(highest, rules.sinks.to(torch.float32)[:, None])
        highest = highest.masked_fill(highest == -math.inf, 0.0)
        weights = (logits - highest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if rules.sinks is not None:
            total += (rules.sinks.to(torch.float32)[:, None] - highest).exp_()
        out[part] = ((weights @ values) / total.masked_fill(total == 0, 1.0)).to(out.dtype)
        if lse is not None:
            lse[part] = (highest + total.log())[..., 0]


def _masked(scores: Tensor, distance: Tensor, rules: Rules) -> Tensor:
    """Scores [n, group, tokens] as the softmax takes them; distance [n, tokens] is key minus query."""
    if rules.softcap > 0:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if rules.alibi is not None:
        scores = scores + rules.alibi.to(torch.float32)[:, None] * distance[:, None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if rules.left >= 0:
        hidden |= distance < -rules.left
    if rules.right >= 0:
        hidden |= distance > rules.right
    return scores.masked_fill(hidden[:, None, :], -math.inf)
