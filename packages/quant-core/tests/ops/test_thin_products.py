"""Every operator that multiplies, for one token, one input feature or one output feature, in every layout.

torch counts a matrix with one row or one column as contiguous whatever the stride of that axis is, and native products
were seen to take such a matrix for its transpose (operands that reach a product must not let them).
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from bits import pack_eights
from torch import Tensor

from quant_core import microscaling as mx

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")

ROWS, FEATURES = (1, 2, 17), (1, 2, 5, 64)
THIN = [shape for shape in itertools.product(ROWS, FEATURES, FEATURES) if 1 in shape]


def layouts(matrix: Tensor) -> Iterator[Tensor]:
    """A matrix stored by rows, by columns, and as a part of a larger one, by rows and by columns."""
    rows, columns = matrix.shape
    yield matrix.contiguous()
    yield matrix.t().contiguous().t()
    for turned in (False, True):
        larger = torch.empty(rows + 3, columns + 6, dtype=matrix.dtype)
        larger = larger.t().contiguous().t() if turned else larger
        larger[1 : 1 + rows, 2 : 2 + columns] = matrix
        yield larger[1 : 1 + rows, 2 : 2 + columns]
    if 1 in matrix.shape:
        yield matrix.flatten().as_strided(matrix.shape, (1, 1))


def pairs(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in all layouts."""
    yield from itertools.product(layouts(left), layouts(right))


def int8(*shape: int) -> Tensor:
    """Random codes."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def close(got: Tensor, left: Tensor, right: Tensor) -> None:
    """Equal to left @ right up to sums in float32."""
    tolerance = 2**-20 * (left.abs() @ right.abs())
    assert bool(((got.to(torch.float64) - left @ right).abs() <= tolerance).all())


@pytest.mark.parametrize(("m", "k", "n"), THIN)
def test_int8(m: int, k: int, n: int) -> None:
    x, w = int8(m, k), int8(k, n)
    sums = x.to(torch.float64) @ w.to(torch.float64)
    for a, b in pairs(x, w):
        got = npu.npu_quant_matmul(a, b, torch.ones(1), output_dtype=torch.int32)
        assert torch.equal(got.to(torch.float64), sums), (a.stride(), b.stride())


@pytest.mark.parametrize(("m", "n"), [(1, 8), (2, 8), (17, 8), (1, 1), (17, 1)])
def test_int4(m: int, n: int) -> None:
    """One int32 holds eight input features, or eight output features."""
    x, w = torch.randint(-8, 8, (m, 8), dtype=torch.int32), torch.randint(-8, 8, (n, 8), dtype=torch.int32)
    sums = x.to(torch.float64) @ w.to(torch.float64).t()
    weights = [pack_eights(w).t(), *([pack_eights(w.t().contiguous())] if n == 8 else [])]
    for weight in weights:
        for a, b in pairs(pack_eights(x), weight):
            got = npu.npu_quant_matmul(a, b, torch.ones(1), output_dtype=torch.int32)
            assert torch.equal(got.to(torch.float64), sums), (a.stride(), b.stride())


@pytest.mark.parametrize(("m", "k", "n"), THIN)
def test_weight_only(m: int, k: int, n: int) -> None:
    x, w, scale = torch.randn(m, k), int8(k, n), torch.rand(n) + 0.5
    for a, b in pairs(x, w):
        close(npu.npu_weight_quant_batchmatmul(a, b, scale), x.to(torch.float64), w.to(torch.float64) * scale)


@pytest.mark.parametrize(("m", "k", "n"), THIN)
def test_fp8(m: int, k: int, n: int) -> None:
    x, w, tokens = (torch.randn(*shape).to(torch.float8_e4m3fn) for shape in ((m, k), (k, n), (m, 1)))
    rows = tokens.to(torch.float64) * x.to(torch.float64)
    for a, b in pairs(x, w):
        for weight in (b, b.to(torch.bfloat16)):
            scales = {"pertoken_scale": tokens.flatten().to(torch.float32), "output_dtype": torch.float32}
            close(npu.npu_quant_matmul(a, weight, torch.ones(1), **scales), rows, w.to(torch.float64))


@pytest.mark.parametrize(("m", "k", "n"), THIN)
def test_microscaled(m: int, k: int, n: int) -> None:
    x, w = torch.randn(m, k).to(torch.float8_e4m3fn), torch.randn(k, n).to(torch.float8_e4m3fn)
    powers = [torch.randint(120, 135, (rows, mx.blocks_of(k)), dtype=torch.uint8) for rows in (m, n)]
    left, right = (
        values.to(torch.float64) * (2.0 ** (p.to(torch.float64) - 127)).repeat_interleave(32, 1)[:, :k]
        for values, p in zip((x, w.t()), powers, strict=True)
    )
    options = {"scale_dtype": 293, "pertoken_scale_dtype": 293, "group_sizes": [1, 1, 32], "output_dtype": 6}
    for a, b in pairs(x, w):
        token_pairs, pairs_of_weight = (mx.pair_exponents(p) for p in powers)
        got = npu.npu_quant_matmul(a, b, pairs_of_weight.transpose(0, 1), pertoken_scale=token_pairs, **options)
        close(got, left, right.t())
