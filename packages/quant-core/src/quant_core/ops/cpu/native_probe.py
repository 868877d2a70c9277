"""Trying native operators on extreme values, against plain formulas in float64."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

_BLOCK = 16


def refusal(candidate: Any) -> str | None:
    """Why these operators cannot serve on this processor; None if they compute what they must."""
    for dtype, x in itertools.product((torch.int8, torch.float8_e4m3fn), (torch.float32, torch.bfloat16)):
        if wrong := _writing(candidate, dtype, x):
            return f"{wrong} of the codes of {x} in {dtype} are wrong on this processor"
        for size, group, queries in itertools.product((128, 40), (1, 5, 8), (1, 6)):
            error = _attending(candidate, dtype, x, size, group, queries)
            if not error < (3e-6 if x == torch.float32 else 4e-3):
                return (
                    f"attention of {x} to {dtype} is wrong by {error:.1e} on this processor (D {size}, {group} heads)"
                )
    return None


def _cpu(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _writing(candidate: Any, dtype: torch.dtype, x: torch.dtype) -> int:
    """Codes that are wrong, of numbers at ties and beyond the largest code."""
    half = torch.arange(-300, 300, dtype=torch.float32, device="cpu") / 2
    tiny = torch.arange(-40, 40, dtype=torch.float32, device="cpu") / 2**11
    row = torch.cat([half, tiny, half * 4, _cpu([0.0, 1e30, -1e30, math.inf, -math.inf])])
    rows = torch.cat([row, row.new_zeros(-len(row) % 80)]).view(-1, 1, 80).to(x)
    pages = torch.zeros(-(-len(rows) // _BLOCK), 1, _BLOCK, 80, dtype=dtype, device="cpu")
    scale, offset = row.new_full((1, 80), 0.5), row.new_full((1, 80), 3.0)
    slots = torch.arange(len(rows), device="cpu")
    candidate.quantize_to_pages(rows, rows, pages, pages.clone(), scale, offset, scale, None, slots)
    exact = rows.double() / 0.5 + 3
    rounded = exact.round().clamp(-128, 127) if dtype == torch.int8 else exact.clamp(-448, 448).float()
    want = rounded.to(dtype)
    got = pages.flatten(0, 2)[: len(rows)]
    return int((got.view(torch.uint8) != want[:, 0].view(torch.uint8)).sum())


def _attending(candidate: Any, dtype: torch.dtype, x: torch.dtype, size: int, group: int, queries: int) -> float:
    """The relative error with all codes there are, in two blocks that are not in order."""
    tokens, heads = 27, 2
    every = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    if dtype != torch.int8:
        every = every[(every & 0x7F) != 0x7F]
    codes = every.repeat(3 * heads * 2 * _BLOCK * size // len(every) + 1)[: 3 * heads * 2 * _BLOCK * size]
    both = codes.view(dtype).view(3, heads, 2 * _BLOCK, size)
    pages = both[:, :, :_BLOCK], both[:, :, _BLOCK:]
    scale = torch.linspace(0.5, 1.5, heads * size, device="cpu", dtype=torch.float32).view(heads, size)
    scale /= 127.0 if dtype == torch.int8 else 448.0
    offset = (torch.arange(heads * size, device="cpu").view(heads, size) % 17 - 8).float()
    angles = torch.arange(queries * heads * group * size, device="cpu", dtype=torch.float32)
    query = (2 * torch.sin(angles * 0.37)).view(queries, heads * group, size).to(x)
    out = torch.empty_like(query)
    table, starts, lengths = (
        torch.tensor(values, dtype=torch.int32, device="cpu") for values in ([[2, 0]], [0, queries], [tokens])
    )
    rules = (size**-0.5, -1, 0, 0.0, None, None)
    candidate.attend(query, *pages, scale, offset, scale, None, table, starts, lengths, *rules, out, None)
    keys, values = (one[[2, 0]].transpose(1, 2).flatten(0, 1)[:tokens].double() for one in _float(pages))
    keys = ((keys - offset) * scale).repeat_interleave(group, 1)
    values = (values * scale).repeat_interleave(group, 1)
    scores = torch.einsum("qhd,thd->hqt", query.double(), keys) * size**-0.5
    places = torch.arange(tokens, device="cpu")
    scores = scores.masked_fill(places > (places[-queries:])[:, None], -math.inf)
    want = torch.einsum("hqt,thd->qhd", scores.softmax(-1), values)
    return float((out - want).abs().max() / want.abs().max())


def _float(pages: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [one.to(torch.float32) for one in pages]
