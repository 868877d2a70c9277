"""The exact product of two int8 matrices on this processor.

A fast int8 product is wrong on some processors: without VNNI, oneDNN multiplies u8 by s8 in pairs that saturate at 16
bits, silently (operators.md, section 4). So each candidate is tried once per process on the values that would
saturate, and the first one that is right serves.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# 2^24 / 128^2: so many products of int8 values add up exactly in float32.
_EXACT_CHUNK = 1024


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm`: fast where the processor has VNNI."""
    return torch._int_mm(a, b)


def float32_chunks(a: Tensor, b: Tensor) -> Tensor:
    """Float32 products over chunks of k that are short enough to be exact, added up in int32. Right everywhere."""
    k = a.shape[-1]
    total = (a[:, :_EXACT_CHUNK].to(torch.float32) @ b[:_EXACT_CHUNK].to(torch.float32)).to(torch.int32)
    for start in range(_EXACT_CHUNK, k, _EXACT_CHUNK):
        stop = start + _EXACT_CHUNK
        total += (a[:, start:stop].to(torch.float32) @ b[start:stop].to(torch.float32)).to(torch.int32)
    return total


#: Fastest first; the last one needs no probe.
CANDIDATES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (int_mm, float32_chunks)


def refusal(candidate: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Why this candidate cannot serve here, None if it can."""
    # Extreme values of every sign, and enough rows and columns for a blocked kernel.
    extremes = torch.tensor([127, -128, 127, 127, -128, -128, 1, -1], dtype=torch.int8)
    a = extremes.repeat(32, 32)
    b = extremes.repeat(64, 32).roll(1, 1).t()
    a[1::2] = 127
    b[:, 1::2] = -128
    try:
        got = candidate(a, b)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    want = (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)
    wrong = int((got != want).sum())
    return f"{wrong} of {want.numel()} sums are wrong on this processor" if wrong else None


@functools.cache
def choose() -> Callable[[Tensor, Tensor], Tensor]:
    """The first candidate that is right on this processor."""
    return next(c for c in CANDIDATES if c is float32_chunks or refusal(c) is None)


def report() -> dict[str, str]:
    """Each candidate and what was found: `serves`, `works`, or why not."""
    chosen = choose()
    return {c.__name__: "serves" if c is chosen else refusal(c) or "works" for c in CANDIDATES}


def int8_gemm(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] int8 times [k, n] int8 as exact int32 sums (which wrap beyond 2^31, as on the device)."""
    if 0 in (a.shape[0], *b.shape):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    return choose()(a, b)
