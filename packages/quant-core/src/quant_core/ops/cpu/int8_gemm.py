"""The exact product of two int8 matrices on this processor.

A fast int8 product is wrong on some processors: without VNNI, oneDNN multiplies u8 by s8 in pairs that saturate at 16
bits, silently (docs/operators.md, section 4). Others are right, and many times slower than float32. So
each candidate is tried once per process on the values that would saturate, and the fastest of those that are right
serves: which one that is depends on the number of rows.
"""

import bisect
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: [m, k] int8 times [k, n] int8 as int32 sums [m, n].
Product = Callable[[Tensor, Tensor], Tensor]

# Sums of integers are exact in float32 up to here.
_EXACT = 2**24
# So many products of int8 values add up to less in any case.
_CHUNK = _EXACT // 128**2
# Rows that are multiplied at a time, and how many of them are few.
_ROWS = 512
_FEW_ROWS = 128
# float32 values of the weight that are made at a time: enough for a fast product, and they stay in the cache.
_BLOCK = 2**21


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm`: fast where the processor has VNNI."""
    return torch._int_mm(unmistakable(a), unmistakable(b))


def int_mm_swapped(a: Tensor, b: Tensor) -> Tensor:
    """The same as (bᵀ aᵀ)ᵀ: oneDNN rearranges its second operand at each call, and here that is the smaller one."""
    return torch._int_mm(unmistakable(b).t(), unmistakable(a).t()).t().contiguous()


def unmistakable(matrix: Tensor) -> Tensor:
    """The same matrix with strides that a native product cannot take for those of another one.

    The stride of an axis of size 1 means nothing and may be anything. oneDNN takes [1, c] with strides (1, 1), which
    torch counts as contiguous, for a transposed matrix, and reads beyond its end; so such an axis gets the stride that
    it has in a matrix that is stored row by row ([1, c]) or column by column ([r, 1]).

    Args:
        matrix: [r, c]; if one of them is 1, a view is returned, otherwise the matrix itself.

    """
    rows, columns = matrix.shape
    if rows != 1 and columns != 1:
        return matrix
    row, column = matrix.stride()
    return matrix.as_strided((rows, columns), (columns * column, column) if rows == 1 else (row, rows * row))


def float32_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Float32 products of parts that are small enough for the cache and for exact sums. Right everywhere."""
    sums = torch.empty(a.shape[0], b.shape[1], dtype=torch.int32)
    for start in range(0, a.shape[0], _ROWS):
        total = sums[start : start + _ROWS]
        for index, product in enumerate(_float32_products(a[start : start + _ROWS].to(torch.float32), b)):
            if index == 0:
                total.copy_(product)
            else:
                total += product.to(torch.int32)
    return sums


def _float32_products(rows: Tensor, b: Tensor) -> list[Tensor]:
    """[m, k] float32 times [k, n] int8: exact float32 [m, n], one for each span of k. Converts b block by block."""
    (m, k), n = rows.shape, b.shape[1]
    few, vector = m <= _FEW_ROWS, m == 1 and torch.get_num_threads() > 1
    # With few rows, the product is twice as fast the other way round.
    spans = [(span, torch.empty((n, m) if few else (m, n), dtype=torch.float32)) for span in _exact_spans(rows)]
    columns, transposed = rows.t(), b.t()
    width = min(n, max(64, _BLOCK // k // (2 if few and not vector else 1)))
    # One buffer for all blocks: fresh memory costs more than the conversion.
    buffer = torch.empty_like(transposed[:width], dtype=torch.float32)
    for start in range(0, n, width):
        stop = min(n, start + width)
        floats = buffer[: stop - start].copy_(transposed[start:stop])
        if vector:
            # The BLAS may cut the block over its threads otherwise than the conversion did, and fetching what another
            # core has written takes longer than the product. These two do not.
            floats *= rows
        for span, product in spans:
            if vector:
                torch.sum(floats[:, span], dim=1, keepdim=True, out=product[start:stop])
            elif few:
                torch.mm(floats[:, span], columns[span], out=product[start:stop])
            else:
                torch.mm(rows[:, span], floats[:, span].t(), out=product[:, start:stop])
    return [product.t() if few else product for _, product in spans]


def _exact_spans(rows: Tensor) -> Iterator[slice]:
    """Cuts of k between which all sums are exact, the fewer the smaller the activations [m, k] are."""
    k, start = rows.shape[1], 0
    if k <= _CHUNK or rows.abs().sum(dim=1).max().item() * 128 <= _EXACT:
        yield slice(0, k)
        return
    magnitude = torch.zeros(rows.shape[0], dtype=torch.float32)
    for low in range(0, k, _CHUNK):
        added = rows[:, low : low + _CHUNK].abs().sum(dim=1)
        magnitude = magnitude + added
        if low > start and magnitude.max().item() * 128 > _EXACT:
            yield slice(start, low)
            start, magnitude = low, added
    yield slice(start, k)


#: The last one is right everywhere and needs no probe.
CANDIDATES: tuple[Product, ...] = (int_mm, int_mm_swapped, float32_blocks)


#: What a candidate is tried on: rows, input features, output features. Kernels differ in where they are wrong: at one
#: row and at many, at one column, at one input feature, in what is left of a block, in sums that float32 cannot hold.
_TRIED = (
    *((1, 256, 64), (5, 256, 64), (32, 256, 64), (32, 251, 64), (1, 3, 64)),
    *((1, 1, 1), (1, 1, 2), (2, 1, 64), (1, 8, 1), (5, 251, 1), (32, 256, 1), (2, 2, 2), (7, 33, 3), (3, 2101, 5)),
)


def refusal(candidate: Product) -> str | None:
    """Why this candidate cannot serve here, None if it can."""
    wrong = tried = 0
    for m, k, n in _TRIED:
        for a, b in _operands(m, k, n):
            try:
                got = candidate(a, b)
            except (RuntimeError, AttributeError) as error:  # AttributeError: not in this release of torch
                return str(error).splitlines()[0]
            # The sums are far from where float64 or int32 would lose digits; float32 does, and must round.
            want = (a.to(torch.float64) @ b.to(torch.float64)).to(got.dtype)
            wrong, tried = wrong + int((got != want).sum()), tried + want.numel()
    return f"{wrong} of {tried} sums are wrong on this processor" if wrong else None


def _operands(m: int, k: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same [m, k] and [k, n] in all layouts that layers have."""
    a, weight = _extremes(m, k, n)
    for left, right in itertools.product(_layouts(a), _layouts(weight)):
        yield left, right.t()


def _layouts(matrix: Tensor) -> list[Tensor]:
    """A matrix stored row by row, column by column, and as a part of a larger one."""
    rows, columns = matrix.shape
    larger = torch.zeros(rows + 7, columns + 5, dtype=matrix.dtype)
    part = larger[3 : 3 + rows, 2 : 2 + columns]
    part.copy_(matrix)
    return [matrix, matrix.t().contiguous().t(), part]


def _extremes(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """[m, k] and [n, k] of the largest values of every sign."""
    pattern = torch.tensor([127, -128, 127, 127, -128, -128, 1, -1], dtype=torch.int8)
    a = pattern.repeat(m, k // 8 + 1)[:, :k].contiguous()
    weight = pattern.roll(1).repeat(n, k // 8 + 1)[:, :k].contiguous()
    a[::2] = 127
    weight[::3], weight[1::3] = -128, 127  # 127 · 127 · k is odd, so that a large sum of them needs all its digits
    return a, weight


def milliseconds(candidate: Product, rows: int) -> float:
    """What so many rows take with a small weight, for a candidate that is right: the best of several times."""
    return _race(rows)[candidate]


@functools.cache
def _race(rows: int) -> dict[Product, float]:
    """The best milliseconds of all candidates that are right, on one thread."""
    best = dict.fromkeys(_right(), float("inf"))
    threads = torch.get_num_threads()

    def run() -> None:
        # On a busy machine, several threads show how long one waits for another, not which product is the faster one.
        # vLLM replaces torch.set_num_threads by a warning, since the caller's threads are bound to cores: they stay.
        torch._C.set_num_threads(1)
        try:
            _take_turns(best, rows)
        finally:
            torch._C.set_num_threads(threads)  # a part of it, MKL's, holds for the whole process

    with ThreadPoolExecutor(1) as own:
        own.submit(run).result()
    return best


def _take_turns(best: dict[Product, float], rows: int) -> None:
    size = 4096 if rows == 1 else 512  # as large as real ones where that takes no seconds in a plain loop
    a, b = torch.ones(rows, size, dtype=torch.int8), torch.ones(size, size, dtype=torch.int8).t()
    for candidate in best:
        candidate(a, b)  # the first call pays for what later ones find made
    for turn in range(12):
        leader = min(best.values())
        for candidate, time_so_far in best.items():
            if turn < 4 or time_so_far < 1.5 * leader:
                start = time.thread_time()
                candidate(a, b)
                best[candidate] = min(time_so_far, (time.thread_time() - start) * 1e3)


#: Numbers of rows at which candidates are compared; others go with the nearest one below.
SAMPLES = (1, 16, 256)


def choose(rows: int) -> Product:
    """The fastest candidate that is right on this processor. All that are right give the same sums."""
    return _fastest(SAMPLES[bisect.bisect_right(SAMPLES, rows) - 1])


@functools.cache
def _fastest(rows: int) -> Product:
    race = _race(rows)
    return min(race, key=race.__getitem__)


@functools.cache
def _right() -> tuple[Product, ...]:
    return tuple(candidate for candidate in CANDIDATES if candidate is float32_blocks or refusal(candidate) is None)


def report() -> dict[str, str]:
    """Each candidate and what was found: for how many rows it serves and how fast it is, or why it cannot."""

    def verdict(candidate: Product) -> str:
        if candidate not in _right():
            return str(refusal(candidate))
        serves = [f"from {rows}" for rows in SAMPLES if _fastest(rows) is candidate]
        taken = ", ".join(f"{milliseconds(candidate, rows):.2f}" for rows in SAMPLES)
        what = f"serves ({', '.join(serves)} rows)" if serves else "right, but slower"
        return f"{what}: {taken} ms for {', '.join(map(str, SAMPLES))} rows"

    return {candidate.__name__: verdict(candidate) for candidate in CANDIDATES}


def int8_gemm(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] int8 times [k, n] int8 as exact int32 sums (which wrap beyond 2^31, as on the device)."""
    if 0 in (a.shape[0], *b.shape):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    return choose(a.shape[0])(a, b)
