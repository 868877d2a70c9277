"""FlatQuant's transform of the activations, with the quantisation that follows it (docs/operators.md, section 3)."""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.ops.cpu.mx import quantise_blocks
from quant_core.ops.cpu.quantize import saturated
from quant_core.ops.dtypes import dtype_of
from quant_core.packing import pack_eights

# Values that are transformed at a time, as float32 4 MB: they stay in the cache.
_BLOCK = 2**20

_CODES = (torch.int32, torch.quint4x2)
_FP4 = torch.float4_e2m1fn_x2


def npu_kronecker_quant(
    x: Tensor,
    kronecker_p1: Tensor,
    kronecker_p2: Tensor,
    clip_ratio: float | None = None,
    dst_dtype: int | None = None,
    dst_type_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = p1 X p2 of each token, quantised per token to int4: scale = max|Y| · clip / 7, codes = rint(Y / scale).

    Or to FP4 in blocks of 32, as npu_dynamic_mx_quant does, ties to even; then clip_ratio has no effect.

    Y is rounded as on the device: the inner product X p2 to x's dtype, the outer one to float16, for bfloat16 too, and
    for FP4 to bfloat16. A float32 x is ours (the device takes 16 bits only), and nothing is rounded. A zero token has
    scale 0.

    Args:
        x: [m, n1, n2], floating.
        kronecker_p1: [n1, n1] in x's dtype.
        kronecker_p2: [n2, n2] in x's dtype.
        clip_ratio: how much of a token's largest magnitude the codes reach; what lies beyond saturates. None is 1.
        dst_dtype: None, int32 or quint4x2, which are one: int4 in int32. Or 296 for FP4.
        dst_type_max: not supported on CPU.

    Returns:
        int32 codes [m, n1, n2 / 8], eight to a value, lowest bits first; float32 scales [m]. Of FP4 uint8
        [m, n1 · n2 / 2], two to a byte; uint8 exponents [m, ceil(n1 · n2 / 64), 2].

    Raises:
        NotImplementedError: for another target type.
        ValueError: for shapes or dtypes that do not belong together.

    """
    target = torch.int32 if dst_dtype is None else dtype_of(dst_dtype)
    if target not in (*_CODES, _FP4) or dst_type_max is not None:
        raise NotImplementedError(
            f"npu_kronecker_quant: the CPU kernel has int4 and FP4, not {target} with dst_type_max={dst_type_max}"
        )
    _check(x, kronecker_p1, kronecker_p2, 2 if target == _FP4 else 8)
    if target == _FP4:
        return _microscaled(x, kronecker_p1, kronecker_p2)
    count, n1, n2 = x.shape
    clip = 1.0 if clip_ratio is None else clip_ratio
    codes, scales = torch.empty(count, n1, n2 // 8, dtype=torch.int32), torch.empty(count, dtype=torch.float32)
    rows = max(1, _BLOCK // max(1, n1 * n2))
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        y = _transformed(x[block], kronecker_p1, kronecker_p2, torch.float16)
        peak = y.abs().flatten(1).amax(1).to(torch.float32)
        quotients = y.to(torch.float32) * (7 / clip / peak)[:, None, None]
        # To y's dtype before rounding to integers, as the device does: that moves ties. A zero token's NaN become 0.
        codes[block] = pack_eights(saturated(quotients.to(y.dtype).to(torch.float32), -8, 7))
        scales[block] = peak * clip / 7
    return codes, scales


def _microscaled(x: Tensor, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 elements and pairs of exponents; blocks run on from one row of Y to the next."""
    count, n1, n2 = x.shape
    k = n1 * n2
    codes = torch.empty(count, k // 2, dtype=torch.uint8)
    exponents = torch.empty(count, -(-k // (2 * mx.BLOCK)), 2, dtype=torch.uint8)
    rows = max(1, _BLOCK // max(1, k))
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        elements, own = quantise_blocks(_transformed(x[block], p1, p2, torch.bfloat16).flatten(1), _FP4)
        codes[block], exponents[block] = mx.pack_e2m1(elements), mx.pair_exponents(own)
    return codes, exponents


def _check(x: Tensor, p1: Tensor, p2: Tensor, step: int) -> None:
    if x.dim() != 3 or p1.shape != (x.shape[1], x.shape[1]) or p2.shape != (x.shape[2], x.shape[2]):
        raise ValueError(
            f"npu_kronecker_quant: x {list(x.shape)}, p1 {list(p1.shape)} and p2 {list(p2.shape)} are not "
            "[m, n1, n2], [n1, n1] and [n2, n2]"
        )
    if x.shape[2] % step:
        raise ValueError(f"npu_kronecker_quant: the last axis of x {list(x.shape)} is not a multiple of {step}")
    if not x.dtype == p1.dtype == p2.dtype:
        raise ValueError(f"npu_kronecker_quant: x is {x.dtype}, p1 {p1.dtype} and p2 {p2.dtype}; all must be one dtype")


def _transformed(x: Tensor, p1: Tensor, p2: Tensor, outer: torch.dtype) -> Tensor:
    """P1 X p2 of a block, with the device's two roundings, the second to `outer`; accumulated in float32."""
    inner = (x.to(torch.float32) @ p2.to(torch.float32)).to(x.dtype)
    y = p1.to(torch.float32) @ inner.to(torch.float32)
    return y if x.dtype == torch.float32 else y.to(outer)
