"""Quantising activations, and encoding scales.

Arithmetic is float32 whatever the input; rounding is to nearest, ties to even; codes saturate before the cast, which
in torch would wrap (docs/operators.md, sections 2 and 5).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quant_core.ops.cpu import fp8
from quant_core.ops.dtypes import dtype_of
from quant_core.packing import pack_eights

_RANGES = {
    torch.qint8: (-128, 127, torch.int8),
    torch.quint8: (0, 255, torch.uint8),
    torch.quint4x2: (-8, 7, torch.int8),
}

#: What the largest magnitude of a token becomes.
_MAXIMA = {torch.int8: 127, torch.qint8: 127, torch.quint4x2: 7}

# Rows that are quantised at a time: their float32 values stay in the cache.
_ROWS = 128


def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """Static quantisation: rint(x / scales + zp), or rint(x * scales + zp) with div_mode False.

    Args:
        input: [..., k], floating.
        scales: one value, or one per index of the axis.
        zero_points: as scales.
        dtype: qint8 (int8 codes), quint8 (uint8 codes), or, with div_mode False, quint4x2 (int4 codes, eight along the
            last axis to an int32).
        axis: the axis of scales. With div_mode False anything but -2 means the last one.
        div_mode: divide by the scales, or multiply.

    Raises:
        NotImplementedError: for another target type.
        ValueError: for int4 codes that do not fill int32.

    """
    target = dtype_of(dtype)
    if target not in _RANGES or (div_mode and target == torch.quint4x2):
        raise NotImplementedError(f"npu_quantize: the CPU kernel has no {target}; it has {list(_RANGES)}")
    if not div_mode and axis != -2:
        axis = -1
    low, high, carrier = _RANGES[target]
    scale = _along(scales, input, axis)
    zero_point = None if zero_points is None else _along(zero_points, input, axis)
    codes = torch.empty(input.shape, dtype=carrier)
    for rows in _blocks(input):
        values = input[rows].to(torch.float32)
        values = values / _part(scale, rows) if div_mode else values * _part(scale, rows)
        if zero_point is not None:
            values += _part(zero_point, rows)
        codes[rows] = saturated(values, low, high)
    return pack_eights(codes) if target == torch.quint4x2 else codes


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per-token symmetric int8 or int4: scale = max|x| / 127 or / 7, codes = rint(x / scale); a zero row has scale 0.

    Args:
        input: [..., k], floating, at least two axes, as on the device.
        smooth_scales: [k], multiplied first.
        group_index: not supported on CPU.
        dst_type: None or int8; quint4x2 for int4; for float8_e4m3fn and float8_e5m2 see fp8.py.
        quant_mode: `pertoken` only.
        dst_type_max: not supported on CPU.

    Returns:
        int8 codes [..., k], or int32 of eight int4 codes [..., k / 8], and float32 scales [...].

    Raises:
        NotImplementedError: for a mode that the CPU kernel does not have.
        ValueError: for one axis, or int4 codes that do not fill int32.

    """
    target = torch.int8 if dst_type is None else dtype_of(dst_type)
    fp8_target = target in (torch.float8_e4m3fn, torch.float8_e5m2)
    _check_dynamic("npu_dynamic_quant", input, group_index, quant_mode, dst_type_max, fp8_target or target in _MAXIMA)
    if fp8_target:
        return fp8.per_token(input, smooth_scales, target)
    rows, maximum = input.flatten(0, -2).contiguous(), _MAXIMA[target]
    if rows.shape[0] <= _ROWS:  # decoding, where each further call of torch counts
        codes, scales = _per_token(rows, smooth_scales, maximum)
    else:
        codes, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(rows.shape[0], dtype=torch.float32)
        for block in _blocks(rows):
            codes[block], scales[block] = _per_token(rows[block], smooth_scales, maximum)
    codes = codes.view(input.shape)
    return pack_eights(codes) if target == torch.quint4x2 else codes, scales.view(input.shape[:-1])


def npu_dynamic_quant_asymmetric(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token int8 or int4 with an offset: a token's smallest value becomes the lowest code, its largest the highest.

    scale = (max - min) / 255 or / 15, at least 1e-12; offset = 127 or 7 - max / scale, not rounded; codes =
    rint(x / scale + offset). So x is about (codes - offset) · scale. Arguments as npu_dynamic_quant.

    Returns:
        int8 codes [..., k], or int32 of eight int4 codes [..., k / 8], and float32 scales and offsets [...].

    Raises:
        NotImplementedError: for a mode that the CPU kernel does not have.
        ValueError: for one axis, or int4 codes that do not fill int32.

    """
    target = torch.int8 if dst_type is None else dtype_of(dst_type)
    known = target in _MAXIMA
    _check_dynamic("npu_dynamic_quant_asymmetric", input, group_index, quant_mode, dst_type_max, known)
    rows, maximum = input.flatten(0, -2), _MAXIMA[target]
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scale, offset = (torch.empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    for block in _blocks(rows):
        values = rows[block].to(torch.float32)
        if smooth_scales is not None:
            values = values * smooth_scales.to(torch.float32)
        low, high = torch.aminmax(values, dim=-1)
        scale[block] = ((high - low) / (2 * maximum + 1)).clamp(min=1e-12)
        offset[block] = maximum - high / scale[block]
        shifted = values / scale[block, None] + offset[block, None]
        codes[block] = saturated(shifted, -maximum - 1, maximum).to(torch.int8)
    codes = codes.view(input.shape)
    outer = input.shape[:-1]
    return pack_eights(codes) if target == torch.quint4x2 else codes, scale.view(outer), offset.view(outer)


def _check_dynamic(
    name: str, input: Tensor, group_index: Tensor | None, quant_mode: str, dst_type_max: float, known: bool
) -> None:
    if input.dim() < 2:
        raise ValueError(f"{name}: the input has the shape {list(input.shape)}, the device wants two axes")
    if group_index is not None or quant_mode != "pertoken" or dst_type_max:
        raise NotImplementedError(
            f"{name}: the CPU kernel has per-token quantisation only (quant_mode={quant_mode!r}, "
            f"group_index given: {group_index is not None}, dst_type_max={dst_type_max})"
        )
    if not known:
        raise NotImplementedError(f"{name}: the CPU kernel does not have this dst_type")


def _per_token(rows: Tensor, smooth_scales: Tensor | None, maximum: int) -> tuple[Tensor, Tensor]:
    values = rows.to(torch.float32)
    if smooth_scales is not None:
        values = values * smooth_scales.to(torch.float32)
    scale = values.abs().amax(dim=-1).div_(maximum)
    # A zero row divides by 0: its NaN become the code 0.
    return saturated(values / scale[:, None], -maximum - 1, maximum).to(torch.int8), scale


def _blocks(values: Tensor) -> Iterator[slice]:
    """The first axis of a matrix in parts; anything else whole."""
    if values.dim() != 2:
        yield slice(None)
        return
    for start in range(0, values.shape[0], _ROWS):
        yield slice(start, start + _ROWS)


def _part(values: Tensor, rows: slice) -> Tensor:
    """The scales of some rows; those that all rows share as they are."""
    return values[rows] if values.dim() and values.shape[0] > 1 else values


def saturated(values: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """float32 values rounded to the codes low..high, NaN to 0. Overwrites its argument."""
    return values.round_().nan_to_num_(0.0).clamp_(low, high)


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """Encode float32 scales as the matmul unit reads them: the top 19 bits, bit 46, and an offset in bits 37 to 45."""
    if offset is not None and scale.shape != offset.shape:
        scale, offset = torch.broadcast_tensors(scale, offset)
    bits = scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = _nearest_fp19(bits)
    encoded = (bits & 0xFFFFE000) | (1 << 46)
    if offset is None:
        return encoded
    nine_bits = offset.to(torch.float32).round().clamp(-256, 255).to(torch.int64) & 0x1FF
    return (encoded & 0x4000FFFFFFFF) | (nine_bits << 37)


def fp19(scale: Tensor) -> Tensor:
    """A scale as the matmul unit sees it: float32 or encoded int64, truncated to 10 mantissa bits, as float32."""
    # The int32 of an int64 is its low half.
    bits = scale.to(torch.int32) if scale.dtype == torch.int64 else scale.to(torch.float32).view(torch.int32)
    return (bits & ~0x1FFF).view(torch.float32)


def _nearest_fp19(bits: Tensor) -> Tensor:
    half_minus_one = 0xFFF
    return bits + half_minus_one + ((bits >> 13) & 1)


def _along(values: Tensor, input: Tensor, axis: int) -> Tensor:
    """Scales or zero points as float32, shaped to broadcast along `axis` of the input."""
    values = values.to(torch.float32)
    if values.numel() == 1:
        return values.reshape(())
    if values.numel() != input.shape[axis]:
        raise ValueError(f"npu_quantize: {values.numel()} scales or zero points for axis {axis} of {list(input.shape)}")
    shape = [1] * input.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)
