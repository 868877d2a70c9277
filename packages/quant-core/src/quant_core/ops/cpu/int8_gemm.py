"""The exact product of two int8 matrices on this processor.

A fast int8 product is wrong on some processors: without VNNI, oneDNN multiplies u8 by s8 in pairs that saturate at 16
bits, silently (operators.md, section 4). On others it is right but a plain loop, many times slower than float32. So
each candidate is tried once per process on the values that would saturate, and the fastest of those that are right
serves.
"""

import functools
import time
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


#: The last one is right everywhere and needs no probe.
CANDIDATES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (int_mm, float32_chunks)


def refusal(candidate: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Why this candidate cannot serve here, None if it can."""
    # One row and many, a whole block of k and one with a rest: kernels differ in where they are wrong.
    for rows, k in ((1, 256), (32, 256), (32, 251), (1, 3)):
        a, b = _extremes(rows, k)
        try:
            got = candidate(a, b)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        want = (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)
        wrong = int((got != want).sum())
        if wrong:
            return f"{wrong} of {want.numel()} sums are wrong on this processor"
    return None


def _extremes(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """[rows, k] and [k, 64] of the largest values of every sign, the second one transposed as weights are."""
    pattern = torch.tensor([127, -128, 127, 127, -128, -128, 1, -1], dtype=torch.int8)
    a = pattern.repeat(rows, k // 8 + 1)[:, :k].contiguous()
    b = pattern.roll(1).repeat(64, k // 8 + 1)[:, :k].contiguous()
    a[::2] = 127
    b[::3] = -128
    return a, b.t()


@functools.cache
def milliseconds(candidate: Callable[[Tensor, Tensor], Tensor]) -> float:
    """What a small product takes: the best of several times, since other processes get in between."""
    a, b = torch.ones(16, 512, dtype=torch.int8), torch.ones(256, 512, dtype=torch.int8).t()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        candidate(a, b)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


@functools.cache
def choose() -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest candidate that is right on this processor. All that are right give the same sums."""
    right = [c for c in CANDIDATES if c is float32_chunks or refusal(c) is None]
    return right[0] if len(right) == 1 else min(right, key=milliseconds)


def report() -> dict[str, str]:
    """Each candidate and what was found: `serves`, how fast it is against the chosen one, or why it cannot."""
    chosen = choose()

    def verdict(candidate: Callable[[Tensor, Tensor], Tensor]) -> str:
        if candidate is chosen:
            return "serves"
        reason = refusal(candidate)
        if reason is not None:
            return reason
        taken, best = milliseconds(candidate), milliseconds(chosen)
        return f"right, but takes {taken:.2f} ms where the chosen one takes {best:.2f}"

    return {candidate.__name__: verdict(candidate) for candidate in CANDIDATES}


def int8_gemm(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] int8 times [k, n] int8 as exact int32 sums (which wrap beyond 2^31, as on the device)."""
    if 0 in (a.shape[0], *b.shape):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    return choose()(a, b)
