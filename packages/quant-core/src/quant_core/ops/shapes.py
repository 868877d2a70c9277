"""Fake functions: the shape and dtype that each operator returns, equal to torch_npu's Meta kernels."""

import torch
from torch import Tensor

from quant_core.ops.dtypes import dtype_of

_CARRIERS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """The input's shape in the carrier of the quantised dtype; int4 is packed eight to an int32."""
    return _quantised(input, dtype)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codes, and one float32 scale per token."""
    codes = input.new_empty(input.shape, dtype=torch.int8) if dst_type is None else _quantised(input, dst_type)
    return codes, input.new_empty(input.shape[:-1], dtype=torch.float32)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """[..., m, n]; without an output dtype it is int8."""
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    dtype = torch.int8 if output_dtype is None else dtype_of(output_dtype)
    return x1.new_empty((*batch, x1.shape[-2], x2.shape[-1]), dtype=dtype)


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """The scale's shape (the longer of two 1-D ones) as int64."""
    shape = scale.shape
    if offset is not None and offset.dim() == 1 and scale.dim() == 1:
        shape = offset.shape if offset.shape[0] > scale.shape[0] else scale.shape
    return scale.new_empty(shape, dtype=torch.int64)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """[..., m, n] in x's dtype, int8 if the output is quantised."""
    dtype = x.dtype if quant_scale is None else torch.int8
    return x.new_empty((*x.shape[:-1], weight.shape[-1]), dtype=dtype)


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The logical shape does not change."""
    return torch.empty_like(input)


def _quantised(input: Tensor, dtype: int) -> Tensor:
    torch_dtype = dtype_of(dtype)
    if torch_dtype == torch.quint4x2:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 8), dtype=torch.int32)
    return input.new_empty(input.shape, dtype=_CARRIERS.get(torch_dtype, torch_dtype))
