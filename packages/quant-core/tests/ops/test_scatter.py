"""npu_scatter_pa_kv_cache, against a loop."""

import pytest
import torch

scatter = torch.ops.npu.npu_scatter_pa_kv_cache

T, HEADS, BLOCKS, BLOCK = 5, 2, 4, 16
SLOTS = torch.tensor([40, 3, -1, 63, 0], dtype=torch.int32)
DTYPES = [torch.int8, torch.float8_e4m3fn, torch.bfloat16]


def rows(size: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(T, HEADS, size) * 50).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.double(), b.double())


@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_tokens(dtype: torch.dtype, slots: torch.dtype) -> None:
    both = torch.zeros(BLOCKS, HEADS, 2 * BLOCK, 32, dtype=dtype)
    key, value = rows(32, dtype), rows(32, dtype)
    caches = [both[:, :, half * BLOCK : (half + 1) * BLOCK].transpose(1, 2) for half in range(2)]
    assert scatter(key, value, *caches, SLOTS.to(slots), cache_mode="Norm") is None
    for new, cache in zip((key, value), caches, strict=True):
        want = torch.zeros(BLOCKS * BLOCK, HEADS, 32, dtype=dtype)
        for token, slot in enumerate(SLOTS.tolist()):
            if slot >= 0:
                want[slot] = new[token]
        assert same(cache.reshape(BLOCKS * BLOCK, HEADS, 32), want)


@pytest.mark.parametrize("axes", [4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_tokens_are_the_default(dtype: torch.dtype, axes: int) -> None:
    piece = 32 if dtype.itemsize == 1 else 16
    sizes, new, caches = (64, 32), [], []
    for size in sizes:
        shape = (BLOCKS, HEADS, size // piece, BLOCK, piece)
        cache = torch.zeros(shape, dtype=dtype)
        caches.append(cache if axes == 5 else cache.flatten(1, 2))
        new.append(rows(size, dtype))
    scatter(*new, *caches, SLOTS)
    for written, cache, size in zip(new, caches, sizes, strict=True):
        pieces = cache.view(BLOCKS, HEADS, size // piece, BLOCK, piece)
        for token, slot in enumerate(SLOTS.tolist()):
            if slot >= 0:
                for i in range(size):
                    got = pieces[slot // BLOCK, :, i // piece, slot % BLOCK, i % piece]
                    assert same(got, written[token, :, i])
        assert int((cache.double() != 0).sum()) <= 4 * HEADS * size


def test_what_it_does_not_have_is_named() -> None:
    key, cache = rows(32, torch.int8), torch.zeros(BLOCKS, BLOCK, HEADS, 32, dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="cache_mode 'PA'"):
        scatter(key, key, cache, cache.clone(), SLOTS, cache_mode="PA")
    with pytest.raises(NotImplementedError, match="seq_lens"):
        scatter(key, key, cache, cache.clone(), SLOTS, seq_lens=SLOTS, cache_mode="Norm")
    with pytest.raises(ValueError, match=r"torch.int8 for a cache of torch.bfloat16"):
        scatter(key, key, cache.bfloat16(), cache.bfloat16(), SLOTS, cache_mode="Norm")
