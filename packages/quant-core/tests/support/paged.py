"""Sequences in pages, and attention to them in float64, written without the package's code."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import quant_core.ops  # noqa: F401 - defines the operators

KV_HEADS = 2

#: What is tested.
attend_pages: Callable[..., None] = torch.ops.quant_core.attend_pages


@dataclass
class Cache:
    """Codes of sequences in one tensor of pages, whose blocks are in no order; what is not stored is rubbish."""

    lengths: list[int]
    dtype: torch.dtype = torch.int8
    size: int = 64  # D of keys
    value_size: int | None = None
    block: int = 16
    heads: int = KV_HEADS
    offsets: bool = True
    layout: str = "halves"  # of one page: keys in front of values; "apart"; "tokens": [blocks, block, heads, D]
    keys: list[Tensor] = field(default_factory=list)  # float64 [tokens, heads, D]
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        value_size = self.value_size or self.size
        per_sequence = [-(-length // self.block) for length in self.lengths]
        blocks = sum(per_sequence) + 3
        self.key_pages, self.value_pages = self._pages(blocks, value_size)
        for pages in (self.key_pages, self.value_pages):
            pages.view(torch.uint8).fill_(0x7F)  # NaN in FP8, the largest code in int8
        self.k_scale, self.v_scale = (torch.rand(self.heads, d) * 0.02 + 0.005 for d in (self.size, value_size))
        self.k_offset, self.v_offset = (self._offset(d) for d in (self.size, value_size))
        order = torch.randperm(blocks).tolist()
        self.block_table = torch.zeros(len(self.lengths), max([1, *per_sequence]) + 1, dtype=torch.int32)
        for sequence, length in enumerate(self.lengths):
            ids = [order.pop() for _ in range(per_sequence[sequence])]
            self.block_table[sequence, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.block_table[sequence, len(ids) :] = -7  # never looked at
            for pages, scale, offset, kept in (
                (self.key_pages, self.k_scale, self.k_offset, self.keys),
                (self.value_pages, self.v_scale, self.v_offset, self.values),
            ):
                codes = self._codes(length, pages.shape[3])
                for token in range(length):
                    pages[ids[token // self.block], :, token % self.block] = codes[token]
                exact = codes.double() - (0 if offset is None else offset.double())
                kept.append(exact * scale.double())

    def _pages(self, blocks: int, value_size: int) -> tuple[Tensor, Tensor]:
        heads, block, size = self.heads, self.block, self.size
        if self.layout == "halves":
            assert size == value_size
            both = torch.zeros(blocks, heads, 2 * block, size, dtype=self.dtype)
            return both[:, :, :block], both[:, :, block:]
        if self.layout == "tokens":
            return tuple(
                torch.zeros(blocks, block, heads, d, dtype=self.dtype).transpose(1, 2) for d in (size, value_size)
            )  # type: ignore[return-value]
        return tuple(torch.zeros(blocks, heads, block, d, dtype=self.dtype) for d in (size, value_size))  # type: ignore[return-value]

    def _offset(self, size: int) -> Tensor | None:
        return torch.randint(-20, 20, (self.heads, size)).float() if self.offsets else None

    def _codes(self, tokens: int, size: int) -> Tensor:
        if self.dtype == torch.int8:
            return torch.randint(-128, 128, (tokens, self.heads, size), dtype=torch.int8)
        return (torch.randn(tokens, self.heads, size) * 50).clamp(-448, 448).to(self.dtype)

    def attend(self, query: Tensor, query_start: list[int], out: Tensor, **rules: Any) -> None:
        """By the operator."""
        chosen = {"scale": 0.1, "causal": True, "window": -1, "softcap": 0.0, "sinks": None, "alibi": None, **rules}
        attend_pages(
            query,
            self.key_pages,
            self.value_pages,
            self.k_scale,
            self.k_offset,
            self.v_scale,
            self.v_offset,
            self.block_table,
            torch.tensor(query_start, dtype=torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
            *(chosen[name] for name in ("scale", "causal", "window", "softcap", "sinks", "alibi")),
            out,
        )


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float = 0.1,
    causal: bool = True,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, in float64: queries [n, H, D], keys and values [tokens, heads, D]; outputs and log-sums."""
    n, all_heads, _ = query.shape
    tokens, heads = keys.shape[:2]
    out = torch.zeros(n, all_heads, values.shape[2], dtype=torch.float64)
    lse = torch.full((n, all_heads), -math.inf, dtype=torch.float64)
    for head in range(all_heads):
        of = head // (all_heads // heads)
        for i in range(n):
            position = tokens - n + i
            seen = torch.tensor(
                [(j <= position or not causal) and (window <= 0 or abs(j - position) < window) for j in range(tokens)],
                dtype=torch.bool,
            )
            scores = keys[:, of] @ query[i, head].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi is not None:
                scores = scores + alibi[head].double() * (torch.arange(tokens) - position)
            scores = scores[seen]
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            if len(scores) == 0:
                continue
            weights = torch.softmax(scores, 0)
            lse[i, head] = torch.logsumexp(scores, 0)
            out[i, head] = weights[: int(seen.sum())] @ values[seen][:, of]
    return out, lse


def error(got: Tensor, want: Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())
