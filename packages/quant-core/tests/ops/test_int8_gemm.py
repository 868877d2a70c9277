"""Exactness of the int8 products, and that the probe lets no wrong one serve."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant_core.ops.cpu import int8_gemm
from quant_core.ops.cpu.int8_gemm import (
    CANDIDATES,
    SAMPLES,
    choose,
    float32_blocks,
    int_mm,
    int_mm_swapped,
    milliseconds,
    refusal,
    report,
    unmistakable,
)

RIGHT = [candidate for candidate in CANDIDATES if refusal(candidate) is None]
SHAPES = [(1, 1, 1), (1, 64, 64), (3, 5, 7), (17, 33, 65), (32, 1025, 16), (16, 4095, 8), (128, 256, 64), (1, 2049, 3)]
# One row, one column (a head with one output), one input feature (a layer that is cut very often).
SHAPES += [(m, k, n) for m in (1, 2, 16) for k in (1, 8, 256) for n in (1, 2, 64) if 1 in (m, k, n)]
# More rows and columns than `float32_blocks` takes at a time, with a rest.
SHAPES += [(257, 300, 70), (600, 40, 9), (2, 16, 70_000), (5, 20_000, 130)]


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product by int64 arithmetic."""
    return a.to(torch.int64) @ b.to(torch.int64)


def operands(m: int, k: int, n: int, kind: str) -> tuple[Tensor, Tensor]:
    """Uniform or extreme int8 matrices, the second one transposed as weights are."""
    if kind == "uniform":
        return torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(
            -128, 128, (n, k), dtype=torch.int8
        ).t()
    a, b = torch.full((m, k), -128, dtype=torch.int8), torch.full((n, k), -128, dtype=torch.int8)
    a[1::2] = 127
    b[1::2] = 127
    return a, b.t()


def onednn_u8(a: Tensor, b: Tensor) -> Tensor:
    """oneDNN's u8 by s8 product: really wrong on a processor without VNNI, right with it."""
    n = b.shape[1]
    packed = torch.ops.onednn.qlinear_prepack(b.t().contiguous(), list(a.shape))
    shifted, ones, zeros = (a.to(torch.int16) + 128).to(torch.uint8), torch.ones(n), torch.zeros(n, dtype=torch.int64)
    out = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out.to(torch.int32)


def saturating_pairs(a: Tensor, b: Tensor) -> Tensor:
    """What that product computes without VNNI, spelled out: pairs of u8 · s8 products saturate at 16 bits."""
    k = a.shape[1] + a.shape[1] % 2
    left = torch.nn.functional.pad(a.to(torch.int32) + 128, (0, k - a.shape[1]))
    right = torch.nn.functional.pad(b.t().to(torch.int32), (0, k - b.shape[0]))
    products = (left[:, None, :] * right[None, :, :]).view(a.shape[0], b.shape[1], k // 2, 2)
    return products.sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1).to(torch.int32) - 128 * right.sum(-1).to(torch.int32)


def sums_in_float16(a: Tensor, b: Tensor) -> Tensor:
    """A product that rounds its sums."""
    return exact(a, b).to(torch.float16).to(torch.int32)


def wrong_for_one_row(a: Tensor, b: Tensor) -> Tensor:
    """A product whose separate path for decoding is wrong."""
    return saturating_pairs(a, b) if a.shape[0] == 1 else float32_blocks(a, b)


def wrong_in_the_rest(a: Tensor, b: Tensor) -> Tensor:
    """A product that drops what does not fill a block of four."""
    k = a.shape[1] // 4 * 4
    return exact(a[:, :k], b[:k]).to(torch.int32)


def mistakes_a_row(a: Tensor, b: Tensor) -> Tensor:
    """What `torch._int_mm` does with VNNI, on any processor: a row with unit strides is read as a column, beyond its
    end."""
    rows = [x for x in (a, b) if x.shape[0] == 1 and x.shape[1] > 1 and x.stride() == (1, 1)]
    return float32_blocks(a, b) + 1000 * len(rows)


def mistakes_a_row_swapped(a: Tensor, b: Tensor) -> Tensor:
    """The same the other way round."""
    return mistakes_a_row(b.t(), a.t()).t().contiguous()


def wrong_beyond_float32(a: Tensor, b: Tensor) -> Tensor:
    """A product that hands its sums out in float32."""
    return exact(a, b).to(torch.float32).to(torch.int32)


def unavailable(a: Tensor, b: Tensor) -> Tensor:
    """A product that this build of torch does not have."""
    raise NotImplementedError("'some_kernel' not implemented for 'Char'")


@pytest.mark.parametrize("kind", ["uniform", "extreme"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("candidate", RIGHT)
def test_what_passes_the_probe_is_exact(candidate: Callable[..., Tensor], shape: tuple[int, ...], kind: str) -> None:
    a, b = operands(*shape, kind)
    got = candidate(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.to(torch.int64), exact(a, b))


@given(st.integers(1, 40), st.integers(1, 1500), st.integers(1, 40), st.booleans(), st.integers(0, 2**30))
def test_the_portable_product_is_exact_everywhere(m: int, k: int, n: int, transposed: bool, seed: int) -> None:
    """Explicitly the slow path, on any machine and whatever would be chosen."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator).t()
    got = float32_blocks(a, b if transposed else b.contiguous())
    assert torch.equal(got.to(torch.int64), exact(a, b))


@pytest.mark.parametrize("candidate", [int_mm, int_mm_swapped, onednn_u8, saturating_pairs])
def test_the_probe_knows_whether_a_product_is_right_here(candidate: Callable[..., Tensor]) -> None:
    """Its verdict is compared with what happens to ordinary data on this processor, whichever it is."""
    wrong = 0
    for shape in SHAPES[1:-4]:
        for kind in ("uniform", "extreme"):
            a, b = operands(*shape, kind)
            wrong += int((candidate(a, b).to(torch.int64) != exact(a, b)).sum())
    assert (refusal(candidate) is None) == (wrong == 0)


WRONG = [saturating_pairs, sums_in_float16, wrong_for_one_row, wrong_in_the_rest]
WRONG += [mistakes_a_row, mistakes_a_row_swapped, wrong_beyond_float32]


@pytest.mark.parametrize("candidate", WRONG)
def test_the_probe_finds_a_wrong_product(candidate: Callable[..., Tensor]) -> None:
    assert "sums are wrong" in (refusal(candidate) or "")


def test_the_model_of_saturation_is_what_the_processor_does() -> None:
    """Without VNNI both are wrong by the same amounts; with it, one is right and the other is not."""
    a, b = operands(8, 64, 16, "uniform")
    real, model = onednn_u8(a, b), saturating_pairs(a, b)
    assert not torch.equal(model.to(torch.int64), exact(a, b))
    assert torch.equal(real.to(torch.int64), exact(a, b)) or torch.equal(real, model)


@pytest.mark.parametrize(
    ("candidate", "shape"),
    [
        (mistakes_a_row, (2, 1, 64)),
        (mistakes_a_row, (1, 8, 1)),
        (mistakes_a_row_swapped, (2, 8, 1)),
        (mistakes_a_row_swapped, (1, 8, 1)),
    ],
)
def test_strides_that_cannot_be_mistaken(candidate: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    """Whatever the strides of an axis of size 1 are, a product that goes by them gets it right."""
    a, b = operands(*shape, "uniform")
    left, right = (x.clone().as_strided(x.shape, (1, 1)) if 1 in x.shape else x for x in (a, b))
    assert not torch.equal(candidate(left, right).to(torch.int64), exact(left, right))
    assert torch.equal(candidate(unmistakable(left), unmistakable(right)).to(torch.int64), exact(left, right))


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 5), (5, 1)), ((5, 1), (20, 100)), ((1, 1), (1, 1)), ((3, 4), (20, 1))]
)
def test_only_the_stride_that_means_nothing_changes(shape: tuple[int, int], strides: tuple[int, int]) -> None:
    matrix = torch.arange(200, dtype=torch.uint8).view(10, 20)[2 : 2 + shape[0], 3 : 3 + shape[1]]
    view = unmistakable(matrix)
    assert torch.equal(view, matrix)
    assert view.data_ptr() == matrix.data_ptr()
    assert view.stride() == strides


def test_a_product_that_torch_lacks_is_refused_with_its_words() -> None:
    assert refusal(unavailable) == "'some_kernel' not implemented for 'Char'"


@pytest.mark.parametrize(("rows", "sample"), [(1, 1), (15, 1), (16, 16), (255, 16), (256, 256), (5000, 256)])
def test_the_fastest_right_product_serves(rows: int, sample: int) -> None:
    """`torch._int_mm` without VNNI is right and a plain loop."""
    assert choose(rows) in RIGHT
    assert milliseconds(choose(rows), sample) == min(milliseconds(candidate, sample) for candidate in RIGHT)


def test_the_report_names_every_candidate() -> None:
    verdicts = report()
    assert list(verdicts) == ["int_mm", "int_mm_swapped", "float32_blocks"]
    for rows in SAMPLES:
        serving = [name for name, verdict in verdicts.items() if f"from {rows}" in verdict.partition(" rows)")[0]]
        assert choose(rows).__name__ in serving
    for candidate in CANDIDATES:
        assert verdicts[candidate.__name__].startswith(refusal(candidate) or ("right, but slower", "serves"))


def test_a_report_says_why_a_candidate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_gemm, "CANDIDATES", (unavailable, saturating_pairs, float32_blocks))
    monkeypatch.setattr(int8_gemm, "_right", int8_gemm._right.__wrapped__)
    monkeypatch.setattr(int8_gemm, "_fastest", int8_gemm._fastest.__wrapped__)
    monkeypatch.setattr(int8_gemm, "_race", int8_gemm._race.__wrapped__)
    verdicts = report()
    assert verdicts["float32_blocks"].startswith("serves (from 1, from 16, from 256 rows)")
    assert "not implemented" in verdicts["unavailable"]
    assert "wrong" in verdicts["saturating_pairs"]


@pytest.mark.parametrize(("activation", "spans"), [(127, 4), (64, 2), (32, 1), (-128, 4), (0, 1)])
def test_small_activations_need_fewer_cuts(activation: int, spans: int) -> None:
    """Sums are exact in float32 up to 2^24 = 4096 * 32 * 128, whatever the weights are."""
    rows = torch.full((3, 4096), float(activation))
    cuts = [(span.start, span.stop) for span in int8_gemm._exact_spans(rows)]
    assert len(cuts) == spans
    assert [low for low, _ in cuts] == [0, *(high for _, high in cuts[:-1])]
    assert cuts[-1][1] == 4096
    assert all((high - low) * abs(activation) * 128 <= 2**24 for low, high in cuts)


def test_one_large_row_is_enough_for_a_cut() -> None:
    rows = torch.zeros(5, 2048)
    rows[3] = 127
    assert list(int8_gemm._exact_spans(rows)) == [slice(0, 1024), slice(1024, 2048)]


@pytest.mark.parametrize("k", [40, 3000])
def test_one_row_on_several_threads(k: int) -> None:
    """It is summed up in another way then."""
    a, b = operands(1, k, 70, "extreme")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = float32_blocks(a, b)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got.to(torch.int64), exact(a, b))


@pytest.mark.parametrize("candidate", RIGHT)
def test_columns_of_a_weight(candidate: Callable[..., Tensor]) -> None:
    """W8A8 multiplies by the columns of each member of a fused layer."""
    a, b = operands(4, 1100, 90, "uniform")
    assert torch.equal(candidate(a, b[:, 20:77]).to(torch.int64), exact(a, b[:, 20:77]))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 8, 4), (3, 8, 0), (3, 0, 4)])
@pytest.mark.usefixtures("each_gemm")
def test_products_of_nothing(m: int, k: int, n: int) -> None:
    got = int8_gemm.int8_gemm(torch.zeros(m, k, dtype=torch.int8), torch.zeros(k, n, dtype=torch.int8))
    assert (got.shape, got.dtype) == ((m, n), torch.int32)
    assert not got.any()


@pytest.mark.usefixtures("each_gemm")
def test_sums_wrap_beyond_32_bits() -> None:
    """Nothing real is so wide; the device's accumulator wraps, and a float one must not saturate instead."""
    k = 140_000
    a, b = torch.full((1, k), -128, dtype=torch.int8), torch.full((k, 1), -128, dtype=torch.int8)
    assert int8_gemm.int8_gemm(a, b).item() == k * 2**14 - 2**32
