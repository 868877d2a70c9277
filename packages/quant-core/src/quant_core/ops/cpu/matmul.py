"""Quantised matrix products (docs/operators.md, section 4)."""

import torch
from torch import Tensor

from quant_core.ops.cpu.float_matmul import float_matmul
from quant_core.ops.cpu.groups import ROWS
from quant_core.ops.cpu.int4 import int8_operands
from quant_core.ops.cpu.int4_gemm import int4_gemm, takes
from quant_core.ops.cpu.int8_gemm import int8_gemm
from quant_core.ops.cpu.packed import packed_product
from quant_core.ops.cpu.quantize import fp19, saturated
from quant_core.ops.cpu.w4a8 import w4a8_matmul
from quant_core.ops.dtypes import dtype_of

_TARGETS = (torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32)


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
    """(x1 @ x2 + int32 bias) * scale * pertoken_scale + float bias.

    Args:
        x1: int8 [..., m, k], or int4 in int32 [..., m, k / 8].
        x2: int8 [..., k, n], or int4 in int32 [..., k / 8, n] or [..., k, n / 8]. Of an int8 x1 and an int4 x2,
            w4a8.py says what is computed; of FP8 and FP4 operands float_matmul.py. Ours: what packed.py makes of int8.
        scale: one or n values; float32, bfloat16, or int64 as `npu_trans_quant_param` encodes it.
        offset: one or n float32 values, int8 output only.
        pertoken_scale: float32 [m].
        bias: [n] or [batch, 1, n]. int32 is added to the sums, anything else to the scaled result.
        output_dtype: None is int8; float32 is ours, the device has 16-bit results only.
        x1_dtype: types of the other operands and the rest are for types other than int8.
        x2_dtype: see x1_dtype.
        pertoken_scale_dtype: see x1_dtype.
        scale_dtype: see x1_dtype.
        group_sizes: see x1_dtype.
        y_scale: see x1_dtype.

    Returns:
        [..., m, n].

    Raises:
        NotImplementedError: for operands other than int8 and int4, or another output dtype.
        ValueError: for arguments that have no place in the result.

    """
    if (x1.is_floating_point() or x1.dtype == torch.uint8) and offset is None and y_scale is None:
        dtypes = (output_dtype, x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype)
        return float_matmul(x1, x2, scale, pertoken_scale, bias, *dtypes, group_sizes)
    if x1.dtype == torch.int8 and x2.dtype == torch.int32:
        return w4a8_matmul(x1, x2, scale, offset, pertoken_scale, bias, output_dtype, group_sizes)
    packed = takes(x1, x2)
    if x1.dtype == x2.dtype == torch.int32 and not packed:
        x1, x2 = int8_operands(x1, x2)
    if not (packed or x1.dtype == x2.dtype == torch.int8) or group_sizes or y_scale is not None:
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has int8 x int8, not {x1.dtype} x {x2.dtype}")
    target = torch.int8 if output_dtype is None else dtype_of(output_dtype)
    _check(target, x2.shape[-1], scale, offset, pertoken_scale, bias)
    if x2.is_mkldnn:
        integers = target in (torch.int8, torch.int32) or (bias is not None and bias.dtype == torch.int32)
        sums = packed_product(x1.flatten(0, -2), x2, integers).view(*x1.shape[:-1], x2.shape[1])
    else:
        sums = int4_gemm(x1, x2) if packed else _batched_gemm(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        sums += bias
        bias = None
    if target == torch.int32:
        return sums
    if target == torch.int8:
        return _to_int8(sums, scale, offset)
    # The matmul unit itself scales a float16 result, with 19-bit scales; bfloat16 is scaled in float32.
    columns = fp19(scale) if target == torch.float16 and pertoken_scale is None else _plain(scale)
    return scaled(sums, columns, pertoken_scale, bias, target)


def scaled(sums: Tensor, columns: Tensor, rows: Tensor | None, bias: Tensor | None, target: torch.dtype) -> Tensor:
    """Sums [..., m, n] times columns, times rows, plus bias, in float32; by blocks that stay cached.

    Args:
        sums: int32, or float32 of packed weights.
        columns: [1], [n], or for no more than ROWS rows [m, n].
        rows: [m], or none.
        bias: [n], or none.
        target: dtype of the result.

    """
    if bias is not None:
        bias = bias.to(torch.float32)
    count = sums.shape[-2]
    if count <= ROWS:  # decoding, where each further call of torch counts
        return _scaled_block(sums, columns, rows, bias).to(target)
    result = torch.empty(sums.shape, dtype=target)
    for start in range(0, count, ROWS):
        block = slice(start, start + ROWS)
        scales = None if rows is None else rows[block]
        result[..., block, :] = _scaled_block(sums[..., block, :], columns, scales, bias)
    return result


def _scaled_block(sums: Tensor, columns: Tensor, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    values = sums * columns
    if rows is not None:
        values *= rows[:, None]
    if bias is not None:
        values += bias
    return values


def _check(
    target: torch.dtype,
    n: int,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuse outputs that the kernel does not have, and what would have no place or effect in the result."""
    if target not in _TARGETS:
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has no output {target}; it has {list(_TARGETS)}")
    if scale.numel() not in (1, n) or scale.shape[-1:] != (scale.numel(),):
        raise ValueError(f"npu_quant_matmul: scale is {list(scale.shape)}, expected [1] or [{n}]")
    integral = target in (torch.int8, torch.int32)
    given = {
        "offset": offset is not None and target != torch.int8,
        "pertoken_scale": pertoken_scale is not None and integral,
        "a floating bias": bias is not None and bias.dtype != torch.int32 and integral,
    }
    if any(given.values()):
        names = ", ".join(name for name, unused in given.items() if unused)
        raise ValueError(f"npu_quant_matmul: an output in {target} does not use {names}")


def _batched_gemm(x1: Tensor, x2: Tensor) -> Tensor:
    """int32 sums; batch axes broadcast."""
    if x2.dim() == 2:  # one weight for all rows
        return int8_gemm(x1.flatten(0, -2), x2).view(*x1.shape[:-1], x2.shape[-1])
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    left = x1.expand(*batch, *x1.shape[-2:]).flatten(0, -3)
    right = x2.expand(*batch, *x2.shape[-2:]).flatten(0, -3)
    result = torch.empty(*left.shape[:2], right.shape[2], dtype=torch.int32)
    for index in range(len(left)):
        result[index] = int8_gemm(left[index], right[index])
    return result.view(*batch, *result.shape[1:])


def _to_int8(sums: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Requantised result: both terms go through signed 9 bits first."""
    values = saturated(sums.to(torch.float32) * fp19(scale), -256, 255)
    if offset is not None:
        values = values + saturated(offset.to(torch.float32, copy=True), -256, 255)
    elif scale.dtype == torch.int64:
        nine_bits = (scale >> 37) & 0x1FF
        values = values + torch.where(nine_bits > 255, nine_bits - 512, nine_bits)
    return values.clamp(-128, 127).to(torch.int8)


def _plain(scale: Tensor) -> Tensor:
    """A scale as float32. An encoded one is what its low 32 bits say."""
    return fp19(scale) if scale.dtype == torch.int64 else scale.to(torch.float32)
