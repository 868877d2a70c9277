"""The NPU's attention operator, for the calls that models with quantised caches make."""

import torch
from torch import Tensor

from quant_core.ops.attention_shapes import npu_fused_infer_attention_score as outputs
from quant_core.ops.cpu.attend import Codes, Rules, attend

_NAME = "npu_fused_infer_attention_score"

PER_CHANNEL, PER_HEAD = 0, 2
NO_MASK, RIGHT_DOWN, BAND = 0, 3, 4
_EVERYTHING = 2147483647


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: list[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _EVERYTHING,
    next_tokens: int = _EVERYTHING,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + mask) v of sequences that lie one behind the other ("TND").

    Args:
        query: [T, heads, D], floating.
        key: the same of T keys and num_key_value_heads; with a block table pages [blocks, kv heads, tokens of a block,
            D] with any strides, or [blocks, tokens of a block, kv heads · D]. int8, float8_e4m3fn or floating.
        value: the same.
        actual_seq_lengths: where each sequence's queries end.
        actual_seq_lengths_kv: where each sequence's keys end; with a block table, how many there are of each.
        atten_mask: must be given with modes 3 and 4, which say what it holds, and not with mode 0.
        key_antiquant_scale: with mode 0 one value or [kv heads, D] in any form; with mode 2 [kv heads].
        key_antiquant_offset: the same; what is **added** to codes before they are multiplied.
        value_antiquant_scale: as of the key.
        value_antiquant_offset: as of the key.
        block_table: [B, blocks of a sequence] int32.
        num_heads: of the query.
        scale: what scores are multiplied by.
        pre_tokens: with mode 4, how many keys before its own position a query sees.
        next_tokens: with mode 4, how many behind it.
        input_layout: "TND".
        num_key_value_heads: 0 for as many as the query has.
        sparse_mode: 0 everything, 3 causal with the last query at the last key, 4 a band around that.
        inner_precise: has no meaning here.
        block_size: tokens of a block, which the pages say as well.
        key_antiquant_mode: 0 per channel or tensor, 2 per head.
        value_antiquant_mode: the same.
        softmax_lse_flag: whether the logarithm of the sum of exponentials is wanted.
        pse_shift: not supported on CPU, nor is anything else that is not named here.
        dequant_scale1: see there.
        quant_scale1: see there.
        dequant_scale2: see there.
        quant_scale2: see there.
        quant_offset2: see there.
        antiquant_scale: see there.
        antiquant_offset: see there.
        query_padding_size: see there.
        kv_padding_size: see there.
        key_shared_prefix: see there.
        value_shared_prefix: see there.
        actual_shared_prefix_len: see there.
        query_rope: see there.
        key_rope: see there.
        key_rope_antiquant_scale: see there.
        antiquant_mode: see there.

    Returns:
        [T, heads, D of values] in the query's dtype, and float32 [T, heads, 1], or [0] if it is not wanted.

    Raises:
        NotImplementedError: for what the CPU kernel does not have.
        ValueError: for lengths that are missing, a mask that does not fit the mode, and scales of another size.

    """
    _refuse(
        pse_shift=pse_shift,
        dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size,
        key_shared_prefix=key_shared_prefix,
        value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
        query_rope=query_rope,
        key_rope=key_rope,
        key_rope_antiquant_scale=key_rope_antiquant_scale,
        antiquant_mode=antiquant_mode or None,
        input_layout=None if input_layout == "TND" else input_layout,
        sparse_mode=None if sparse_mode in (NO_MASK, RIGHT_DOWN, BAND) else sparse_mode,
        query=None if query.is_floating_point() and query.dtype.itemsize > 1 else query.dtype,
    )
    if actual_seq_lengths is None or actual_seq_lengths_kv is None:
        raise ValueError(f"{_NAME}: with TND actual_seq_lengths and actual_seq_lengths_kv must be given")
    if (atten_mask is None) != (sparse_mode == NO_MASK):
        wanted = "no" if sparse_mode == NO_MASK else "an"
        raise ValueError(
            f"{_NAME}: sparse_mode {sparse_mode} wants {wanted} atten_mask; without it the device hides nothing"
        )
    out, lse = outputs(
        query,
        key,
        value,
        block_table=block_table,
        num_heads=num_heads,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        softmax_lse_flag=softmax_lse_flag,
    )
    heads = num_key_value_heads or num_heads
    if block_table is None:
        block_table, lengths = _rows(actual_seq_lengths_kv)
        keys, values = key[:, :, None], value[:, :, None]  # a token is a block
    else:
        lengths = actual_seq_lengths_kv
        keys, values = _paged(key, heads), _paged(value, heads)
    attend(
        query,
        _codes("key", keys, key_antiquant_scale, key_antiquant_offset, key_antiquant_mode),
        _codes("value", values, value_antiquant_scale, value_antiquant_offset, value_antiquant_mode),
        block_table,
        torch.tensor([0, *actual_seq_lengths], dtype=torch.int32, device="cpu"),
        torch.tensor(lengths, dtype=torch.int32, device="cpu"),
        _rules(scale, sparse_mode, pre_tokens, next_tokens),
        out,
        lse[..., 0] if softmax_lse_flag else None,
    )
    return out, lse


def _refuse(**given: object) -> None:
    """What is not None is not there."""
    if unknown := [
        name if isinstance(what, Tensor) else f"{name} {what!r}" for name, what in given.items() if what is not None
    ]:
        raise NotImplementedError(f"{_NAME}: the CPU kernel has no {', '.join(unknown)}")


def _rules(scale: float, sparse_mode: int, pre_tokens: int, next_tokens: int) -> Rules:
    if sparse_mode == NO_MASK:
        return Rules(scale, -1, -1)
    if sparse_mode == RIGHT_DOWN:
        return Rules(scale, -1, 0)
    if pre_tokens < 0 or next_tokens < 0:
        raise NotImplementedError(f"{_NAME}: the CPU kernel has no band without a query's own position")
    left, right = (-1 if tokens >= _EVERYTHING else tokens for tokens in (pre_tokens, next_tokens))
    return Rules(scale, left, right)


def _rows(ends: list[int]) -> tuple[Tensor, list[int]]:
    """A table of blocks that hold one token each, for sequences that end there; and their lengths."""
    starts = [0, *ends[:-1]]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    tokens = torch.arange(max([0, *lengths]), dtype=torch.int32, device="cpu")
    return torch.tensor(starts, dtype=torch.int32, device="cpu")[:, None] + tokens, lengths


def _paged(cache: Tensor, heads: int) -> Tensor:
    """Pages as [blocks, heads, tokens of a block, D]."""
    if cache.dim() == 3:
        blocks, block, features = cache.shape
        return cache.view(blocks, block, heads, features // heads).transpose(1, 2)
    if cache.dim() != 4:
        raise NotImplementedError(f"{_NAME}: the CPU kernel has no pages of {cache.dim()} axes (FRACTAL_NZ)")
    return cache


def _codes(what: str, pages: Tensor, scale: Tensor | None, offset: Tensor | None, mode: int) -> Codes:
    """With scale and offset for each channel of each head, the offset as what is subtracted."""
    if scale is None:
        if not (pages.is_floating_point() and pages.dtype.itemsize > 1):
            raise ValueError(f"{_NAME}: {what}s of {pages.dtype} want a {what}_antiquant_scale")
        return Codes(pages, None, None)
    if mode not in (PER_CHANNEL, PER_HEAD):
        raise NotImplementedError(f"{_NAME}: the CPU kernel has no {what}_antiquant_mode {mode}; it has 0 and 2")

    def spread(values: Tensor) -> Tensor:
        heads, size = pages.shape[1], pages.shape[3]
        wanted = [heads] if mode == PER_HEAD else [1, heads * size]
        if values.numel() not in wanted:
            raise ValueError(
                f"{_NAME}: {what}_antiquant_scale or offset has the shape {list(values.shape)}, with "
                f"{what}_antiquant_mode {mode} there must be {' or '.join(map(str, wanted))} values"
            )
        flat: Tensor = values.to(torch.float32).reshape(-1, 1 if mode == PER_HEAD or values.numel() == 1 else size)
        return flat.expand(heads, size).contiguous()

    return Codes(pages, spread(scale), None if offset is None else -spread(offset))
