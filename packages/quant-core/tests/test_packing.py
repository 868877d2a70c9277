"""Packing int4 values in bytes and in int32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant_core.packing import pack_eights, pack_pairs, unpack_eights, unpack_pairs

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def values(seed: int, shape: list[int], low: int = -8, high: int = 8, dtype: torch.dtype = torch.int8) -> Tensor:
    """Random integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(SHAPES, st.data(), st.integers(0, 2**30), st.sampled_from([torch.int8, torch.int32]))
def test_pairs_on_any_axis(shape: list[int], data: st.DataObject, seed: int, dtype: torch.dtype) -> None:
    """The even value in the low nibble, the odd one in the high one; unpacking is the inverse."""
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] *= 2
    given_values = values(seed, shape, dtype=dtype)
    packed = pack_pairs(given_values, axis)
    even, odd = (given_values.movedim(axis, 0)[start::2].movedim(0, axis).to(torch.int64) for start in (0, 1))
    want = even % 16 + odd % 16 * 16
    assert packed.dtype == torch.int8
    assert torch.equal(packed.to(torch.int64) % 256, want)
    assert torch.equal(unpack_pairs(packed, axis), given_values.to(torch.int8))


@given(SHAPES, st.integers(0, 2**30), st.booleans())
def test_eights(shape: list[int], seed: int, transposed: bool) -> None:
    """Value j in bits 4j to 4j + 3, whatever the strides; unpacking is the inverse."""
    shape[-1] *= 8
    given_values = values(seed, shape)
    if transposed:
        given_values = given_values.movedim(-1, 0).contiguous().movedim(0, -1)
    packed = pack_eights(given_values)
    groups = given_values.to(torch.int64).unflatten(-1, (shape[-1] // 8, 8))
    words = ((groups % 16) << (4 * torch.arange(8))).sum(dim=-1)
    assert packed.dtype == torch.int32
    assert torch.equal(packed.to(torch.int64) % 2**32, words)
    assert torch.equal(unpack_eights(packed), given_values)


@given(st.integers(0, 2**30))
def test_of_larger_values_the_lowest_four_bits_are_taken(seed: int) -> None:
    wide = values(seed, [3, 16], -128, 128)
    low = (wide.to(torch.int64) + 8) % 16 - 8
    assert torch.equal(unpack_pairs(pack_pairs(wide, 1), 1).to(torch.int64), low)
    assert torch.equal(unpack_eights(pack_eights(wide)).to(torch.int64), low)


def test_what_does_not_fill_a_carrier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\]: an odd number of values on axis 0"):
        pack_pairs(torch.zeros(3, 4, dtype=torch.int8), 0)
    with pytest.raises(ValueError, match=r"\[2, 12\]: the last axis"):
        pack_eights(torch.zeros(2, 12, dtype=torch.int8))
