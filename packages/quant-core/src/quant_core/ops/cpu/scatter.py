"""Writing keys and values that are quantised already."""

from torch import Tensor

from quant_core.ops.cpu.write import scatter


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Put each token's keys and values at its slot: block · tokens of a block + place.

    Args:
        key: [T, heads, D], of the cache's dtype.
        value: the same, with a D of its own.
        key_cache: with "Norm" [blocks, tokens of a block, heads, D], with any strides; with "PA_NZ"
            [blocks, heads · D / c, tokens of a block, c] or [blocks, heads, D / c, tokens of a block, c].
        value_cache: the same.
        slot_mapping: [T]; tokens of slots below 0, which fill up a batch, are written nowhere.
        compress_lens: not supported on CPU, as the two behind it.
        compress_seq_offsets: see there.
        seq_lens: see there.
        cache_mode: "Norm" or "PA_NZ", which is the default.

    Raises:
        NotImplementedError: for compression, and for another mode.
        ValueError: for a cache of another dtype.

    """
    given = {"compress_lens": compress_lens, "compress_seq_offsets": compress_seq_offsets, "seq_lens": seq_lens}
    unknown = [name for name, tensor in given.items() if tensor is not None]
    if unknown or cache_mode not in ("Norm", "PA_NZ"):
        raise NotImplementedError(
            f"npu_scatter_pa_kv_cache: the CPU kernel has no {', '.join(unknown) or f'cache_mode {cache_mode!r}'}"
        )
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if rows.dtype != cache.dtype:
            raise ValueError(f"npu_scatter_pa_kv_cache: {rows.dtype} for a cache of {cache.dtype}")
        if cache_mode == "Norm":
            scatter(rows, cache.transpose(1, 2), slot_mapping)
        else:
            # What is called a head here is a piece of one.
            pieces = cache.flatten(1, 2) if cache.dim() == 5 else cache
            scatter(rows.reshape(len(rows), pieces.shape[1], pieces.shape[3]), pieces, slot_mapping)
