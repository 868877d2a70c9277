"""Fake functions of the products of many experts, equal to torch_npu's Meta kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_core.ops.dtypes import FLOAT4_E2M1, dtype_of

Operand = Sequence[Tensor] | None


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Operand = None,
    scale: Operand = None,
    offset: Operand = None,
    antiquant_scale: Operand = None,
    antiquant_offset: Operand = None,
    per_token_scale: Operand = None,
    group_list: Tensor | Sequence[int] | None = None,
    activation_input: Operand = None,
    activation_quant_scale: Operand = None,
    activation_quant_offset: Operand = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """One result for all rows, for each x, or for each expert."""
    dtype = x[0].dtype if output_dtype is None else dtype_of(output_dtype)
    stacked = len(weight) == 1 and weight[0].dim() == 3
    columns = [_columns(x[0], one, x_dtype, weight_dtype) for one in weight]
    if split_item in (2, 3):
        return [x[0].new_empty((sum(one.shape[0] for one in x), columns[0]), dtype=dtype)]
    if split_item == 1 and len(x) == 1 and group_list is not None:
        rows = _rows(group_list, group_list_type)
    else:
        rows = [one.shape[0] for one in x]
    return [
        x[0].new_empty((height, columns[0 if stacked else index]), dtype=dtype) for index, height in enumerate(rows)
    ]


def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes, one float32 scale per token, and one that means nothing."""
    codes = x.new_empty((x.shape[0], weight_scale.shape[-1] // 2), dtype=torch.int8)
    return codes, x.new_empty((x.shape[0],), dtype=torch.float32), x.new_empty((), dtype=torch.float32)


def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Operand = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 codes and one float32 scale per token; or FP8 and exponents."""
    n = weight_scale[0].shape[2 if dequant_mode == 2 else -1] // 2
    if dequant_mode != 2:
        return x.new_empty((x.shape[0], n), dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)
    codes = x.new_empty((x.shape[0], n), dtype=dtype_of(1 if quant_dtype is None else quant_dtype))
    return codes, x.new_empty((x.shape[0], -(-n // 64), 2), dtype=torch.uint8)


def _columns(x: Tensor, weight: Tensor, x_dtype: int | None, weight_dtype: int | None) -> int:
    """n of a weight [..., k, n], which is packed along n if it has as many rows as x has values."""
    k = x.shape[1] * (8 if x.dtype == torch.int32 else 2 if x_dtype == FLOAT4_E2M1 else 1)
    fp4 = weight_dtype == FLOAT4_E2M1 and weight.dtype == torch.uint8
    packed = 8 if weight.dtype == torch.int32 else 2 if fp4 else 1
    return weight.shape[-1] * (packed if weight.shape[-2] == k else 1)


def _rows(group_list: Tensor | Sequence[int], list_type: int | None) -> list[Any]:
    """How many rows each expert has, which is not known of a tensor; torch_npu's own Meta kernel cannot tell either."""
    if isinstance(group_list, Tensor):
        raise ValueError(  # a NotImplementedError would be replaced by words of torch's
            "npu_grouped_matmul with split_item 1 cannot be compiled: the sizes of its results are known when it runs; "
            "split_item 2 gives one for all"
        )
    if list_type == 1:
        return list(group_list)
    return [stop - start for start, stop in zip([0, *group_list], group_list, strict=False)]
