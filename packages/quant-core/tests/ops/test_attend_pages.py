"""Attention to 8-bit pages, against float64."""

import itertools
from typing import Any

import paged
import pytest
import torch

INT8, FP8 = torch.int8, torch.float8_e4m3fn

#: What an output may differ by, relative to the largest: the rounding to the query's dtype, and sums in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

pytestmark = pytest.mark.usefixtures("each_pages_path")


def check(
    cache: paged.Cache, queries: list[int], group: int = 2, dtype: torch.dtype = torch.float32, **rules: Any
) -> None:
    """So many queries of each sequence, the last ones of it."""
    rules.setdefault("scale", cache.size**-0.5)
    starts = [0]
    for count in queries:
        starts.append(starts[-1] + count)
    query = (torch.randn(starts[-1], cache.heads * group, cache.size) * 3).to(dtype)
    out = torch.full((starts[-1] + 2, *query.shape[1:2], cache.value_pages.shape[3]), 7.0, dtype=dtype)
    cache.attend(query, starts, out, **rules)
    assert (out[starts[-1] :] == 7.0).all(), "rows of no sequence are left alone"
    for sequence, (start, stop) in enumerate(itertools.pairwise(starts)):
        if start == stop:
            continue
        want, _ = paged.attention(query[start:stop], cache.keys[sequence], cache.values[sequence], **rules)
        assert paged.error(out[start:stop], want) < TOLERANCE[dtype], (sequence, rules)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("layout", ["halves", "apart", "tokens"])
def test_decode(layout: str, offsets: bool, dtype: torch.dtype) -> None:
    check(paged.Cache([1, 15, 16, 17, 200], dtype, offsets=offsets, layout=layout), [1] * 5)


@pytest.mark.parametrize("query", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_batch_of_prefill_chunked_prefill_and_decode(dtype: torch.dtype, query: torch.dtype) -> None:
    check(paged.Cache([33, 70, 1, 90, 5, 129], dtype), [33, 3, 1, 40, 0, 1], dtype=query)


@pytest.mark.parametrize("size", [16, 32, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_head_sizes(dtype: torch.dtype, size: int) -> None:
    check(paged.Cache([40, 37], dtype, size), [1, 20])


@pytest.mark.parametrize("size", [24, 40, 100])
def test_head_sizes_that_fill_no_registers(size: int) -> None:
    check(paged.Cache([40, 37], size=size), [1, 20])


def test_values_of_another_size_than_keys() -> None:
    check(paged.Cache([40, 37], size=192, value_size=128, layout="apart"), [1, 20])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12])
def test_grouped_queries(group: int) -> None:
    check(paged.Cache([70, 45]), [1, 9], group)


@pytest.mark.parametrize("block", [1, 16, 32, 48, 128])
def test_block_sizes(block: int) -> None:
    check(paged.Cache([300, 131], block=block), [1, 100])


RULES: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "window of one": {"window": 1},
    "window": {"window": 20},
    "window, not causal": {"window": 20, "causal": False},
    "window beyond everything": {"window": 1000},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.tensor([0.0, 8.0, -3.0, 25.0])},
    "sinks in bfloat16": {"sinks": torch.tensor([0.0, 8.0, -3.0, 25.0], dtype=torch.bfloat16)},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.01, 1.0])},
    "everything": {
        "window": 30,
        "softcap": 20.0,
        "sinks": torch.tensor([0.0, 8.0, -3.0, 25.0]),
        "alibi": torch.tensor([0.5, 0.25, 0.01, 1.0]),
    },
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_rules(dtype: torch.dtype, rule: str) -> None:
    check(paged.Cache([150, 70, 1, 33, 90], dtype), [1, 50, 1, 33, 9], **RULES[rule])


def test_one_long_sequence_over_several_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        check(paged.Cache([3000], heads=1, size=32), [1], group=1)
        check(paged.Cache([3000, 70], heads=1, size=32), [1, 1], group=4, sinks=torch.tensor([0.0, 9.0, 2.0, -1.0]))
        check(paged.Cache([700, 70], heads=1, size=32), [130, 9], group=2)
    finally:
        torch.set_num_threads(threads)


def test_scores_of_any_size() -> None:
    """Neither overflow nor a loss of what one query attends to alone."""
    check(paged.Cache([100, 60]), [1, 10], scale=30.0)
    check(paged.Cache([100, 60]), [1, 10], scale=1e-6)


def test_a_sequence_without_tokens_is_zero() -> None:
    cache = paged.Cache([0, 20])
    query, out = torch.randn(2, 4, 64), torch.full((2, 4, 64), 7.0)
    cache.attend(query, [0, 1, 2], out)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


def test_queries_before_the_first_token_are_zero() -> None:
    cache = paged.Cache([3])
    query, out = torch.randn(5, 4, 64), torch.full((5, 4, 64), 7.0)
    cache.attend(query, [0, 5], out)
    assert (out[:2] == 0).all()
    want, _ = paged.attention(query[2:], cache.keys[0], cache.values[0])
    assert paged.error(out[2:], want) < 2e-6


def test_a_nan_that_is_stored_is_seen_by_those_who_attend_to_it() -> None:
    cache = paged.Cache([20, 40], FP8)
    place = (int(cache.block_table[1, 1]), 0, 5)
    cache.value_pages[place][3] = torch.nan
    query, out = torch.randn(1 + 40, 4, 64), torch.zeros(41, 4, 64)
    cache.attend(query, [0, 1, 41], out)
    assert out[1 + 21 :, :2, 3].isnan().all()
    assert out[0].isfinite().all(), "the other sequence"
    assert out[:, 2:].isfinite().all()
    cache.key_pages[place][3] = torch.nan
    cache.attend(query, [0, 1, 41], out)
    assert out[1 + 21 :, :2].isnan().all()


def test_a_query_with_strides_and_an_output_in_another_dtype() -> None:
    cache = paged.Cache([30, 50])
    qkv = torch.randn(6, 8, 64, dtype=torch.float64).to(torch.bfloat16)
    out = torch.zeros(6, 4, 128)[:, :, :64]
    cache.attend(qkv[:, 2:6], [0, 1, 6], out)
    want, _ = paged.attention(qkv[1:, 2:6], cache.keys[1], cache.values[1])
    assert paged.error(out[1:], want) < 2e-6


def test_offsets_far_outside_the_codes() -> None:
    """As a channel has them whose values are all far from zero: nothing is lost to cancellation."""
    cache = paged.Cache([60, 40])
    assert cache.k_offset is not None
    assert cache.v_offset is not None
    cache.k_offset[:, ::3] -= 500
    cache.v_offset[:, ::3] -= 500
    cache.keys = [k - 0 for k in cache.keys]
    for kept, scale in ((cache.keys, cache.k_scale), (cache.values, cache.v_scale)):
        for one in kept:
            one[:, :, ::3] += 500 * scale.double()[:, ::3]
    check(cache, [1, 8], scale=0.02)


def test_compiled(compile_afresh: Any) -> None:
    cache = paged.Cache([20, 40])

    def attend(query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        cache.attend(query * 2, [0, 1, 5], out)
        return out + 1

    query = torch.randn(5, 4, 64)
    assert torch.equal(compile_afresh(attend, backend="aot_eager")(query), attend(query))
