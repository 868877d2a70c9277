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


def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and one float32 scale and offset per token."""
    codes, scale = npu_dynamic_quant(input, dst_type=dst_type)
    return codes, scale, torch.empty_like(scale)


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
    if x2_dtype is not None and dtype_of(x2_dtype) == torch.float4_e2m1fn_x2:
        return x1.new_empty((*batch, x1.shape[-2], _fp4_columns(x1, x2, x1_dtype)), dtype=dtype)
    # int4 is packed along n unless k of the two is equally short.
    along_n = x2.dtype == torch.int32 and (x1.dtype != torch.int32 or x1.shape[-1] != x2.shape[-2])
    return x1.new_empty((*batch, x1.shape[-2], x2.shape[-1] * (8 if along_n else 1)), dtype=dtype)


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
    """[m, n] in x's dtype, int8 if the output is quantised."""
    dtype = x.dtype if quant_scale is None else torch.int8
    along_n = weight.dtype == torch.int32 and weight.shape[0] == x.shape[1]  # int4 that is packed so
    return x.new_empty((x.shape[0], weight.shape[-1] * (8 if along_n else 1)), dtype=dtype)


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The logical shape does not change."""
    return torch.empty_like(input)


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Eight values to one."""
    return weight.new_empty((*weight.shape[:-1], weight.shape[-1] // 8))


def npu_kronecker_quant(
    x: Tensor,
    kronecker_p1: Tensor,
    kronecker_p2: Tensor,
    clip_ratio: float | None = None,
    dst_dtype: int | None = None,
    dst_type_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """int4 packed eight to an int32, and one float32 scale per token; or FP4 and pairs of exponents."""
    if dst_dtype is not None and dtype_of(dst_dtype) == torch.float4_e2m1fn_x2:
        count, n1, n2 = x.shape
        codes = x.new_empty((count, n1 * n2 // 2), dtype=torch.uint8)
        return codes, x.new_empty((count, -(-n1 * n2 // 64), 2), dtype=torch.uint8)
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 8), dtype=torch.int32)
    return codes, x.new_empty(x.shape[:1], dtype=torch.float32)


def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """FP8 in the input's shape or FP4 two to a byte, and pairs of exponents along the axis."""
    axis %= input.dim()
    pairs = list(input.shape)
    pairs[axis] = -(-pairs[axis] // (2 * block_size))
    target = dtype_of(dst_type)
    if target == torch.float4_e2m1fn_x2:
        elements = input.new_empty((*input.shape[:-1], input.shape[-1] // 2), dtype=torch.uint8)
    else:
        elements = input.new_empty(input.shape, dtype=target)
    return elements, input.new_empty((*pairs, 2), dtype=torch.uint8)


def npu_dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 two to a byte, a float32 factor per 512 values, and pairs of exponents."""
    *rows, k = input.shape
    return (
        input.new_empty((*rows, k // 2), dtype=torch.uint8),
        input.new_empty((*rows, -(-k // 512)), dtype=torch.float32),
        input.new_empty((*rows, -(-k // 64), 2), dtype=torch.uint8),
    )


def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    """[m, n] of x1 [m, k / 2] and x2 [n, k / 2]."""
    return x1.new_empty((x1.shape[0], x2.shape[0]), dtype=dtype_of(output_dtype))


def _fp4_columns(x1: Tensor, x2: Tensor, x1_dtype: int | None) -> int:
    """n of an FP4 weight, which is packed along n if it has as many rows as x1 has values; ours is int8, not packed."""
    packed = x1_dtype is not None and dtype_of(x1_dtype) == torch.float4_e2m1fn_x2
    along_n = x2.dtype != torch.int8 and x2.shape[-2] == x1.shape[-1] * (2 if packed else 1)
    return x2.shape[-1] * (2 if along_n else 1)


def _quantised(input: Tensor, dtype: int) -> Tensor:
    torch_dtype = dtype_of(dtype)
    if torch_dtype == torch.quint4x2:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 8), dtype=torch.int32)
    return input.new_empty(input.shape, dtype=_CARRIERS.get(torch_dtype, torch_dtype))
