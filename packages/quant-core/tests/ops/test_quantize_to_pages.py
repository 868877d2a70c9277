"""Quantising keys and values and writing them into pages, against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.ops.pages import quantize_to_pages_elsewhere

HEADS, D, BLOCK = 2, 48, 16
INT8, FP8 = torch.int8, torch.float8_e4m3fn

pytestmark = pytest.mark.usefixtures("each_pages_path")

write = torch.ops.quant_core.quantize_to_pages


def want(values: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A quotient and a sum in float32, then what is nearest, ties to even."""
    scaled = values.float() / scale
    if offset is not None:
        scaled = scaled + offset
    exact = scaled.double()
    if dtype == INT8:
        return exact.round().clamp(-128, 127).to(INT8)
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).double()
    distance = (exact.abs()[..., None] - grid).abs()
    nearest = distance.min(dim=-1, keepdim=True).values
    codes = torch.where((distance == nearest) & (torch.arange(127) % 2 == 0), torch.arange(127), -1).amax(-1)
    codes = torch.where(codes < 0, distance.argmin(-1), codes)
    return (codes + 128 * exact.signbit()).to(torch.uint8).view(FP8)


def pages(dtype: torch.dtype, blocks: int = 6, size: int = D) -> Tensor:
    return torch.full((blocks, HEADS, 2 * BLOCK, size), 85, dtype=torch.uint8).view(dtype)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8)


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("size", [16, 40, 48, 128])
def test_codes_and_places(size: int, dtype: torch.dtype, offsets: bool, x: torch.dtype) -> None:
    both = pages(dtype, size=size)
    key_pages, value_pages = both[:, :, :BLOCK], both[:, :, BLOCK:]
    slots = torch.tensor([5 * BLOCK + 15, -1, 0, 3 * BLOCK + 1, -1, 17])
    spread = 300.0 if dtype == FP8 else 80.0
    scales = [torch.rand(HEADS, size) + 0.5 for _ in range(2)]
    offset = [torch.randint(-30, 30, (HEADS, size)).float() if offsets else None for _ in range(2)]
    new = [(torch.randn(len(slots), HEADS, size) * spread).to(x) for _ in range(2)]
    write(*new, key_pages, value_pages, scales[0], offset[0], scales[1], offset[1], slots)
    expected = pages(dtype, size=size)
    for half in range(2):
        codes = want(new[half], scales[half], offset[half], dtype)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                bits(expected)[slot // BLOCK, :, half * BLOCK + slot % BLOCK] = bits(codes)[token]
    assert torch.equal(bits(both), bits(expected))


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_even_and_codes_saturate(x: torch.dtype) -> None:
    both = pages(INT8)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -127.5, -128.5, -129.5, 1e4, -1e4, torch.inf, -torch.inf]
    codes = [0, 2, 2, 0, -2, 126, 127, -128, -128, -128, 127, -128, 127, -128]
    row = torch.zeros(D)
    row[: len(values)] = torch.tensor(values)
    new = row.expand(1, HEADS, D).to(x)
    ones = torch.ones(HEADS, D)
    write(new, new, both[:, :, :BLOCK], both[:, :, BLOCK:], ones, None, ones, None, torch.tensor([20]))
    assert both[1, 0, 4, : len(codes)].tolist() == codes
    assert both[1, 1, BLOCK + 4, : len(codes)].tolist() == codes


def test_it_divides_by_the_scale() -> None:
    """Multiplying by the reciprocal rounds some of these the other way."""
    both = pages(INT8, size=128)
    scale = torch.rand(HEADS, 128) * 0.1 + 1e-3
    new = (torch.arange(-64, 64) + 0.5)[None, None] * scale[None]
    write(new, new, both[:, :, :BLOCK], both[:, :, BLOCK:], scale, None, scale, None, torch.tensor([0]))
    assert torch.equal(both[0, :, 0], want(new, scale, None, INT8)[0])
    assert torch.equal(both[0, :, BLOCK], want(new, scale, None, INT8)[0])


def test_every_float16_becomes_the_nearest_fp8() -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    everything = everything[everything.isfinite()].float()
    everything = torch.cat([everything, torch.zeros(-len(everything) % (HEADS * D))]).view(-1, HEADS, D)
    blocks = -(-len(everything) // BLOCK)
    both, ones = pages(FP8, blocks), torch.ones(HEADS, D)
    slots = torch.arange(len(everything))
    write(everything, everything, both[:, :, :BLOCK], both[:, :, BLOCK:], ones, None, ones, None, slots)
    for half in range(2):
        got = both[:, :, half * BLOCK : (half + 1) * BLOCK].transpose(1, 2).flatten(0, 1)[: len(everything)]
        codes = torch.cat([want(part, ones, None, FP8) for part in everything.split(64)])
        assert torch.equal(bits(got), bits(codes))


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_not_a_number(dtype: torch.dtype) -> None:
    both, ones = pages(dtype), torch.ones(HEADS, D)
    new = torch.full((1, HEADS, D), torch.nan)
    write(new, new, both[:, :, :BLOCK], both[:, :, BLOCK:], ones, None, ones, None, torch.tensor([3]))
    assert (both[0, :, 3] == 0).all() if dtype == INT8 else both[0, :, 3].float().isnan().all()


@pytest.mark.parametrize("tokens", [0, 1, 100])
def test_slices_of_a_fused_projection_into_pages_of_another_order(tokens: int) -> None:
    """Rows that are parts of longer ones, and pages [blocks, block, heads, D] seen as the operator wants them."""
    fused = torch.randn(tokens, 4 * HEADS, D) * 60
    key_pages, value_pages = (torch.zeros(8, BLOCK, HEADS, D, dtype=INT8) for _ in range(2))
    slots = torch.randperm(8 * BLOCK)[:tokens]
    ones = torch.ones(HEADS, D)
    key, value = fused[:, 2 * HEADS : 3 * HEADS], fused[:, 3 * HEADS :]
    write(key, value, key_pages.transpose(1, 2), value_pages.transpose(1, 2), ones, None, ones, None, slots)
    assert torch.equal(key_pages.flatten(0, 1)[slots], want(key, ones, None, INT8))
    assert torch.equal(value_pages.flatten(0, 1)[slots], want(value, ones, None, INT8))


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_composed_of_the_operators_of_an_npu(dtype: torch.dtype, offsets: bool) -> None:
    both, composed = pages(dtype), pages(dtype)
    new = [torch.randn(3, HEADS, D) * 50 for _ in range(2)]
    scale, offset = torch.rand(HEADS, D) + 0.5, torch.full((HEADS, D), 7.0) if offsets else None
    slots = torch.tensor([20, -1, 3])
    for to, operator in ((both, write), (composed, quantize_to_pages_elsewhere)):
        operator(*new, to[:, :, :BLOCK], to[:, :, BLOCK:], scale, offset, scale, None, slots)
    assert torch.equal(bits(both), bits(composed))


def test_compiled(compile_afresh: Callable[..., Any]) -> None:
    def step(both: Tensor, new: Tensor) -> Tensor:
        ones = torch.ones(HEADS, D)
        write(new * 2, new, both[:, :, :BLOCK], both[:, :, BLOCK:], ones, None, ones, None, torch.tensor([3]))
        return new + 1

    new = torch.randn(1, HEADS, D) * 20
    eager, compiled = pages(INT8), pages(INT8)
    step(eager, new)
    compile_afresh(step, backend="aot_eager")(compiled, new)
    assert torch.equal(eager, compiled)
