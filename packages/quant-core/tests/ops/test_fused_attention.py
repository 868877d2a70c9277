"""npu_fused_infer_attention_score, against float64."""

from typing import Any

import paged
import pytest
import torch
from torch import Tensor

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
EVERYTHING = 2147483647

fia = torch.ops.npu.npu_fused_infer_attention_score

pytestmark = pytest.mark.usefixtures("each_pages_path")


def call(cache: paged.Cache, query: Tensor, ends: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    """With the cache's own scales; offsets are added here."""
    out, lse = fia(
        query,
        cache.key_pages,
        cache.value_pages,
        **{
            "actual_seq_lengths": ends,
            "actual_seq_lengths_kv": cache.lengths,
            "block_table": cache.block_table,
            "key_antiquant_scale": cache.k_scale,
            "value_antiquant_scale": cache.v_scale,
            "key_antiquant_offset": None if cache.k_offset is None else -cache.k_offset,
            "value_antiquant_offset": None if cache.v_offset is None else -cache.v_offset,
            "num_heads": query.shape[1],
            "num_key_value_heads": cache.heads,
            "input_layout": "TND",
            "scale": 0.1,
            "softmax_lse_flag": True,
            **options,
        },
    )
    return out, lse


def check(cache: paged.Cache, got: tuple[Tensor, Tensor], query: Tensor, ends: list[int], **rules: Any) -> None:
    out, lse = got
    assert (out.dtype, lse.dtype, lse.shape) == (query.dtype, torch.float32, (*query.shape[:2], 1))
    start = 0
    for sequence, stop in enumerate(ends):
        want, sums = paged.attention(query[start:stop], cache.keys[sequence], cache.values[sequence], **rules)
        assert paged.error(out[start:stop], want) < (3e-6 if query.dtype == torch.float32 else 4e-3)
        torch.testing.assert_close(lse[start:stop, :, 0].double(), sums, rtol=2e-6, atol=2e-5)
        start = stop


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({"sparse_mode": 0}, {"causal": False}),
    "causal": ({"sparse_mode": 3, "atten_mask": MASK}, {}),
    "window": ({"sparse_mode": 4, "atten_mask": MASK, "pre_tokens": 19, "next_tokens": 0}, {"window": 20}),
    "band": (
        {"sparse_mode": 4, "atten_mask": MASK, "pre_tokens": 19, "next_tokens": 19},
        {"window": 20, "causal": False},
    ),
    "band without an end": (
        {"sparse_mode": 4, "atten_mask": MASK, "pre_tokens": EVERYTHING, "next_tokens": 0},
        {},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("query", [torch.float32, torch.bfloat16])
def test_modes(query: torch.dtype, dtype: torch.dtype, mode: str) -> None:
    cache, ends = paged.Cache([40, 90, 7], dtype), [1, 60, 61]
    options, rules = MODES[mode]
    queries = torch.randn(61, 4, 64).to(query)
    check(cache, call(cache, queries, ends, **options), queries, ends, **rules)


def test_one_scale_for_all() -> None:
    cache = paged.Cache([40, 9], offsets=False)
    cache.keys = [k / cache.k_scale.double() * 0.01 for k in cache.keys]
    cache.values = [v / cache.v_scale.double() * 0.02 for v in cache.values]
    queries, ends = torch.randn(3, 4, 64), [1, 3]
    scales = {"key_antiquant_scale": torch.tensor([0.01]), "value_antiquant_scale": torch.tensor([0.02])}
    got = call(cache, queries, ends, sparse_mode=3, atten_mask=MASK, **scales)
    check(cache, got, queries, ends)


def test_one_scale_for_each_head() -> None:
    cache = paged.Cache([40, 9], offsets=False)
    scale = torch.tensor([0.01, 0.03])
    cache.keys = [k / cache.k_scale.double() * scale.double()[:, None] for k in cache.keys]
    cache.values = [(v / cache.v_scale.double() + 3) * scale.double()[:, None] for v in cache.values]
    queries, ends = torch.randn(3, 4, 64), [1, 3]
    options = {"key_antiquant_mode": 2, "value_antiquant_mode": 2}
    scales = {"key_antiquant_scale": scale, "value_antiquant_scale": scale}
    offset = {"value_antiquant_offset": torch.full((2,), 3.0)}
    got = call(cache, queries, ends, sparse_mode=3, atten_mask=MASK, **options, **scales, **offset)
    check(cache, got, queries, ends)


def test_keys_and_values_that_are_not_paged() -> None:
    keys, values = torch.randn(30, 2, 32), torch.randn(30, 2, 16)
    queries = torch.randn(6, 4, 32)
    out, lse = fia(
        queries,
        keys,
        values,
        actual_seq_lengths=[1, 6],
        actual_seq_lengths_kv=[10, 30],
        num_heads=4,
        num_key_value_heads=2,
        input_layout="TND",
        scale=0.2,
        sparse_mode=3,
        atten_mask=MASK,
    )
    assert lse.shape == (0,)
    for rows, tokens in ((slice(0, 1), slice(0, 10)), (slice(1, 6), slice(10, 30))):
        want, _ = paged.attention(queries[rows], keys[tokens].double(), values[tokens].double(), scale=0.2)
        assert paged.error(out[rows], want) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_of_floats(dtype: torch.dtype) -> None:
    pages = [torch.randn(4, 2, 16, 32).to(dtype) for _ in range(2)]
    queries = torch.randn(20, 4, 32).to(dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    options = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "scale": 0.2, "block_table": table}
    lengths = {"actual_seq_lengths": [20], "actual_seq_lengths_kv": [25]}
    out, _ = fia(queries, *pages, **lengths, **options, sparse_mode=3, atten_mask=MASK)
    keys, values = (one[[2, 0]].transpose(1, 2).flatten(0, 1)[:25].double() for one in pages)
    want, _ = paged.attention(queries, keys, values, scale=0.2)
    assert paged.error(out, want) < {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    rows = [one.transpose(1, 2).reshape(4, 16, 64) for one in pages]
    again, _ = fia(queries, *rows, **lengths, **options, sparse_mode=3, atten_mask=MASK)
    assert torch.equal(out, again)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_layout": "BNSD"}, "'BNSD'"),
        ({"sparse_mode": 2, "atten_mask": MASK}, "sparse_mode 2"),
        ({"pse_shift": torch.ones(1)}, "pse_shift"),
        ({"query_rope": torch.ones(1), "key_rope": torch.ones(1)}, "query_rope, key_rope"),
        ({"key_antiquant_mode": 1}, "key_antiquant_mode 1"),
        ({"sparse_mode": 4, "atten_mask": MASK, "pre_tokens": -1}, "band"),
        ({"quant_scale2": torch.ones(1)}, "quant_scale2"),
    ],
)
def test_what_it_does_not_have_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        call(paged.Cache([5]), torch.randn(1, 4, 64), [1], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparse_mode": 3}, "wants an atten_mask"),
        ({"atten_mask": MASK}, "wants no atten_mask"),
        ({"actual_seq_lengths_kv": None}, "must be given"),
        ({"key_antiquant_scale": torch.ones(3)}, r"\[3\].* 1 or 128 values"),
        ({"value_antiquant_mode": 2}, "there must be 2 values"),
        ({"key_antiquant_scale": None}, "key_antiquant_scale"),
    ],
)
def test_calls_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(paged.Cache([5]), torch.randn(1, 4, 64), [1], **options)
