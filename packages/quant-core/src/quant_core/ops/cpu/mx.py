"""Microscaling quantisation of activations (docs/operators.md, section 8)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.ops.dtypes import dtype_of

#: Elements that share a scale of the first level.
LEVEL0 = 512

# Rows that are quantised at a time: their float32 values stay in the cache.
_ROWS = 64

_FP4 = torch.float4_e2m1fn_x2


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
    """Quantise in blocks of 32 that share a power of two.

    Args:
        input: floating. A float32 input is ours, the device takes 16 bits only.
        axis: along which blocks lie.
        round_mode: `rint`, ties to even; or `round`, ties away from zero, for FP4 only.
        dst_type: float8_e4m3fn, float8_e5m2, or 296 for FP4 (E2M1).
        block_size: 32.
        scale_alg: 0, the exponent is floor(log2(max)) less that of the largest element, and values beyond saturate;
            1, for FP8 only, it is rounded up so that none does.
        dst_type_max: not supported on CPU.
        max_low_bound: for scale_alg 1, what a block's maximum counts as at least.

    Returns:
        Elements: FP8 in the input's shape, or FP4 two to a uint8 along the last axis. Exponents: uint8, the axis
        shortened to ceil(k / 64), with a new last axis of two: block b is at (b // 2, b % 2), an odd last one is
        followed by 0.

    Raises:
        NotImplementedError: for another target, rule or block size.
        ValueError: for FP4 with an odd last axis.

    """
    target = dtype_of(dst_type)
    modes = ("rint", "round") if target == _FP4 else ("rint",)
    algorithms = (0,) if target == _FP4 else (0, 1)
    if (
        target not in mx.EMAX
        or round_mode not in modes
        or scale_alg not in algorithms
        or block_size != mx.BLOCK
        or dst_type_max
    ):
        raise NotImplementedError(
            f"npu_dynamic_mx_quant: the CPU kernel has no {target} with round_mode={round_mode!r}, "
            f"scale_alg={scale_alg}, block_size={block_size}, dst_type_max={dst_type_max}"
        )
    axis %= input.dim()
    rows = input.movedim(axis, -1)
    elements, exponents = _quantised(rows, target, round_mode == "round", scale_alg, max_low_bound)
    elements = elements.movedim(-1, axis).contiguous()
    if target == _FP4:
        elements = mx.pack_e2m1(elements)
    return elements, mx.pair_exponents(exponents).movedim(-2, axis).contiguous()


def npu_dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 on two levels: per 512 values a factor max|x| / 6, and what it leaves in blocks of 32.

    Args:
        input: [..., k], floating, k even.
        smooth_scale: [k], multiplied first.
        round_mode: as in npu_dynamic_mx_quant.

    Returns:
        uint8 [..., k / 2], float32 [..., ceil(k / 512)], uint8 exponents [..., ceil(k / 64), 2].

    Raises:
        NotImplementedError: for another round_mode.
        ValueError: for an odd k.

    """
    if round_mode not in ("rint", "round"):
        raise NotImplementedError(f"npu_dynamic_dual_level_mx_quant: the CPU kernel has no round_mode {round_mode!r}")
    values = input.to(torch.float32)
    if smooth_scale is not None:
        values = values * smooth_scale.to(torch.float32)
    k = input.shape[-1]
    groups = torch.nn.functional.pad(values, (0, -k % LEVEL0)).unflatten(-1, (-(-k // LEVEL0), LEVEL0))
    factors = groups.abs().amax(-1) / mx.E2M1_MAX
    # Zeros divided by zero are zero. The device keeps the quotient in the input's dtype.
    quotients = (groups / factors[..., None]).nan_to_num_(0.0).to(input.dtype).flatten(-2)[..., :k]
    codes, exponents = _quantised(quotients, _FP4, round_mode == "round", 0, 0.0)
    return mx.pack_e2m1(codes), factors, mx.pair_exponents(exponents)


def _quantised(
    values: Tensor, target: torch.dtype, ties_away: bool, scale_alg: int | None, low: float
) -> tuple[Tensor, Tensor]:
    """Elements [..., k], of FP4 the codes, and exponents [..., blocks]."""
    rows = values.reshape(-1, values.shape[-1])
    carrier = torch.uint8 if target == _FP4 else target
    elements = torch.empty(rows.shape, dtype=carrier)
    exponents = torch.empty(rows.shape[0], mx.blocks_of(rows.shape[1]), dtype=torch.uint8)
    for part in _parts(rows):
        elements[part], exponents[part] = quantise_blocks(rows[part], target, ties_away, scale_alg, low)
    return elements.view(values.shape), exponents.view(*values.shape[:-1], exponents.shape[1])


def quantise_blocks(
    values: Tensor, target: torch.dtype, ties_away: bool = False, scale_alg: int | None = 0, low: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Elements [..., k], of FP4 the codes, and uint8 exponents [..., blocks], all in one step.

    The exponent of a block with infinity or NaN in it is NaN, and its elements are 0.
    """
    blocks = mx.in_blocks(values.to(torch.float32))
    peaks = blocks.abs().amax(-1)
    if scale_alg == 1:
        exponents = mx.ceil_exponents(peaks.clamp(min=low) / torch.finfo(target).max)
    else:
        exponents = mx.floor_exponents(peaks, mx.EMAX[target])
    # The reciprocal of 2^(e - 127) has the exponent 254 - e; NaN's 255 becomes 255 again, by overflow.
    scaled = blocks * mx.e8m0_values(254 - exponents)[..., None]
    if target == _FP4:
        elements = mx.e2m1_codes(scaled, ties_away)
    else:
        largest = torch.finfo(target).max
        elements = scaled.nan_to_num_(0.0).clamp_(-largest, largest).to(target)
    return elements.flatten(-2)[..., : values.shape[-1]], exponents


def _parts(rows: Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[0], _ROWS):
        yield slice(start, start + _ROWS)
