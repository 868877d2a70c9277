"""Sample calls of the attention operators."""

from typing import Any

import torch
from operator_calls import bf16, f8, i8, numbers, ones, x

BLOCKS = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
PAGED = {
    "block_table": BLOCKS,
    "actual_seq_lengths": [1, 5],
    "actual_seq_lengths_kv": [17, 20],
    "num_heads": 4,
    "num_key_value_heads": 2,
    "input_layout": "TND",
    "block_size": 16,
    "scale": 0.25,
}
#: Keys and values are halves of each page.
PAGES, FP8_PAGES = i8(4, 2, 32, 32), f8(4, 2, 32, 32)
PER_CHANNEL = {"key_antiquant_scale": ones(2, 1, 32, dtype=bf16), "value_antiquant_scale": ones(2, 1, 32, dtype=bf16)}
PER_HEAD: dict[str, Any] = {
    "key_antiquant_scale": ones(2),
    "value_antiquant_scale": ones(2),
    "key_antiquant_mode": 2,
    "value_antiquant_mode": 2,
}

#: Operator, then arguments as a real call has them.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "attention to int8 pages": (
        "npu_fused_infer_attention_score",
        (x(5, 4, 32), PAGES[:, :, :16], PAGES[:, :, 16:]),
        {**PAGED, **PER_CHANNEL, "sparse_mode": 3, "atten_mask": MASK},
    ),
    "attention to fp8 pages": (
        "npu_fused_infer_attention_score",
        (x(5, 4, 32), FP8_PAGES[:, :, :16], FP8_PAGES[:, :, 16:]),
        {**PAGED, **PER_HEAD, "sparse_mode": 4, "atten_mask": MASK, "pre_tokens": 7, "next_tokens": 0},
    ),
    "attention to pages of rows": (
        "npu_fused_infer_attention_score",
        (x(5, 4, 32), x(4, 16, 64), x(4, 16, 64)),
        {**PAGED, "softmax_lse_flag": True},
    ),
    "attention to what is not paged": (
        "npu_fused_infer_attention_score",
        (x(5, 4, 32), x(9, 2, 32), x(9, 2, 16)),
        {
            "actual_seq_lengths": [1, 5],
            "actual_seq_lengths_kv": [3, 9],
            "num_heads": 4,
            "num_key_value_heads": 2,
            "input_layout": "TND",
        },
    ),
    "write": (
        "npu_scatter_pa_kv_cache",
        (i8(3, 2, 32), i8(3, 2, 32), i8(4, 16, 2, 32), i8(4, 16, 2, 32), numbers(17, 0, 40, dtype=torch.int32)),
        {"cache_mode": "Norm"},
    ),
    "write in pieces": (
        "npu_scatter_pa_kv_cache",
        (i8(3, 2, 64), i8(3, 2, 32), i8(4, 4, 16, 32), i8(4, 2, 16, 32), numbers(17, 0, 40, dtype=torch.int32)),
        {},
    ),
    "write floats in pieces": (
        "npu_scatter_pa_kv_cache",
        (x(3, 2, 64), x(3, 2, 32), x(4, 2, 4, 16, 16), x(4, 2, 2, 16, 16), numbers(17, 0, 40, dtype=torch.int32)),
        {},
    ),
}
