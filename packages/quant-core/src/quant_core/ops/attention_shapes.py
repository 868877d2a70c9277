"""Fake functions of the attention operators, equal to torch_npu's Meta kernels."""

from typing import Any

import torch
from torch import Tensor


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    softmax_lse_flag: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The query's shape with the value's D, and float32 [T, heads, 1] if it is asked for. For TND only."""
    if input_layout != "TND":
        raise NotImplementedError(f"npu_fused_infer_attention_score: there is no input_layout {input_layout!r} on CPU")
    size = value.shape[-1]
    if block_table is not None and value.dim() == 3:
        size //= num_key_value_heads or num_heads
    if block_table is not None and value.dim() == 5:
        size = value.shape[2] * value.shape[4]
    lse = (*query.shape[:2], 1) if softmax_lse_flag else (0,)
    return query.new_empty((*query.shape[:2], size)), query.new_empty(lse, dtype=torch.float32)


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, **_: Any
) -> None:
    """Nothing is returned."""
