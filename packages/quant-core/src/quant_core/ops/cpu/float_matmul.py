"""Products of FP8 and FP4 matrices (docs/operators.md, sections 4 and 8).

Weights may come decoded, which is ours: looking their codes up at each call takes longer than a product of few rows.
An FP8 weight is then bfloat16, which has all values of E4M3, an FP4 weight int8 with twice the values of E2M1.
"""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.ops.cpu.blocks import product
from quant_core.ops.cpu.decode import Decoder
from quant_core.ops.cpu.mx import LEVEL0
from quant_core.ops.dtypes import dtype_of

_FP4 = torch.float4_e2m1fn_x2
# Dtypes of operands and what these carry: as the device takes them, and weights that come decoded.
_CODES = {(torch.float8_e4m3fn,) * 2, (torch.float8_e5m2,) * 2, (torch.uint8, _FP4)}
_DECODED = {(torch.bfloat16,) * 2, (torch.int8, _FP4)}
_TARGETS = (torch.float16, torch.bfloat16, torch.float32)


def float_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    x1_dtype: int | None,
    x2_dtype: int | None,
    pertoken_scale_dtype: int | None,
    scale_dtype: int | None,
    group_sizes: list[int] | None,
) -> Tensor:
    """npu_quant_matmul for operands that are FP8 or FP4.

    Args:
        x1: [m, k] FP8, or [m, k / 2] uint8 with x1_dtype FP4.
        x2: [k, n] FP8, or uint8 with x2_dtype FP4: [k / 2, n], packed along k, or [k, n / 2], packed along n. Ours:
            [k, n] bfloat16, and int8 with x2_dtype FP4, twice the values.
        scale: float32, one or n values; for MX uint8 with scale_dtype E8M0: [ceil(k / 64), n, 2].
        pertoken_scale: float32 [m]; for MX uint8 with pertoken_scale_dtype E8M0: [m, ceil(k / 64), 2].
        bias: [n], added last.
        output_dtype: float16, bfloat16, or float32.
        x1_dtype: the dtype of what x1 carries.
        x2_dtype: the dtype of what x2 carries.
        pertoken_scale_dtype: see pertoken_scale.
        scale_dtype: see scale.
        group_sizes: for MX [1, 1, 32] or [0, 0, 32], or nothing.

    Returns:
        [m, n].

    Raises:
        NotImplementedError: for operands, batches or groups that the CPU kernel does not have.
        ValueError: for shapes that do not fit together.

    """
    target = None if output_dtype is None else dtype_of(output_dtype)
    fp4 = [_carries_fp4(x1, x1_dtype, _CODES), _carries_fp4(x2, x2_dtype, _CODES | _DECODED)]
    scales = [_is_e8m0(s, number) for s, number in ((pertoken_scale, pertoken_scale_dtype), (scale, scale_dtype))]
    if target not in _TARGETS or x1.dim() != 2 or x2.dim() != 2 or scales[0] != scales[1] or any(fp4) > scales[0]:
        raise NotImplementedError(
            f"npu_quant_matmul: the CPU kernel has no {x1.dtype} {list(x1.shape)} x {x2.dtype} {list(x2.shape)} with "
            f"E8M0 scales {scales} and output {target}"
        )
    if group_sizes and (not scales[0] or list(group_sizes) not in ([1, 1, 32], [0, 0, 32])):
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has no group_sizes {list(group_sizes)}")
    rows, decode = Decoder()(x1), Decoder()
    weight = _weight_rows(x2, rows.shape[1], fp4[1])
    if pertoken_scale is not None and scales[0]:
        y = _microscaled_product(rows, weight, pertoken_scale, scale)
    else:
        y = product(rows, weight.shape[0], lambda part: decode(weight[part])).mul_(scale.to(torch.float32))
        if pertoken_scale is not None:
            y.mul_(pertoken_scale.to(torch.float32)[:, None])
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(target)


def _microscaled_product(rows: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    """[m, k] times n rows of a weight, each with the exponents of its blocks: [m, pairs, 2] and [pairs, n, 2]."""
    (m, k), n, decode = rows.shape, weight.shape[0], Decoder()
    pairs = -(-mx.blocks_of(k) // 2)
    found, expected = [list(x_scale.shape), list(scale.shape)], [[m, pairs, 2], [pairs, n, 2]]
    if found != expected:
        raise ValueError(
            f"npu_quant_matmul: pertoken_scale is {found[0]} and scale {found[1]}, expected {expected[0]} and "
            f"{expected[1]}"
        )
    mx.scale_blocks_(rows, _factors(x_scale))
    exponents, doubled = scale.transpose(0, 1), weight.dtype == torch.int8

    def scaled(part: slice) -> Tensor:
        factors = _factors(exponents[part])
        # Here and not in the sums: twice the values may be infinite when the values are not.
        return mx.scale_blocks_(decode(weight[part]), factors * 0.5 if doubled else factors)

    return product(rows, n, scaled)


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
    """Σ over 512 input features of x1_level0 · x2_level0 · their product of microscaled FP4, and a bias.

    Args:
        x1: [m, k / 2] uint8 or int8.
        x2: [n, k / 2] uint8 or int8, on the device in the NZ layout. Ours: [n, k] int8, twice the values.
        x1_level0_scale: float32 [m, ceil(k / 512)].
        x2_level0_scale: float32 [ceil(k / 512), n].
        x1_level1_scale: uint8 exponents [m, ceil(k / 64), 2].
        x2_level1_scale: uint8 exponents [n, ceil(k / 64), 2].
        bias: [n].
        output_dtype: float16, bfloat16, or float32, which is ours.

    Returns:
        [m, n].

    Raises:
        NotImplementedError: for another output.
        ValueError: for shapes that do not fit together.

    """
    target = dtype_of(output_dtype)
    if target not in _TARGETS:
        raise NotImplementedError(f"npu_dual_level_quant_matmul: the CPU kernel has no output {target}")
    (m, half), n = x1.shape, x2.shape[0]
    doubled = x2.dtype == torch.int8 and x2.shape[1] == 2 * half
    groups, pairs = -(-2 * half // LEVEL0), -(-half // mx.BLOCK)
    found = [list(t.shape) for t in (x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale)]
    expected = [[n, 2 * half if doubled else half], [m, groups], [groups, n], [m, pairs, 2], [n, pairs, 2]]
    if found != expected:
        raise ValueError(f"npu_dual_level_quant_matmul: x2 and the scales are {found}, expected {expected}")
    weight, factors = (x2, x2_level0_scale.t() * 0.5) if doubled else (x2.view(torch.uint8), x2_level0_scale.t())

    def decoded(decode: Decoder, codes: Tensor, level0: Tensor, level1: Tensor) -> Tensor:
        blocks = level0.repeat_interleave(LEVEL0 // mx.BLOCK, dim=1)[:, : 2 * pairs]
        return mx.scale_blocks_(decode(codes), _factors(level1) * blocks)

    rows, decode = decoded(Decoder(), x1.view(torch.uint8), x1_level0_scale, x1_level1_scale), Decoder()
    y = product(rows, n, lambda part: decoded(decode, weight[part], factors[part], x2_level1_scale[part]))
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(target)


def _weight_rows(x2: Tensor, k: int, fp4: bool) -> Tensor:
    """A weight [k, n] as its n rows, codes of FP4 packed along k: [n, k] or [n, k / 2].

    Raises:
        ValueError: for shapes that do not fit together.

    """
    packed = fp4 and x2.dtype == torch.uint8
    if packed and x2.shape[0] == k:
        return mx.pack_e2m1(mx.unpack_e2m1(x2).t())
    if x2.shape[0] * (2 if packed else 1) != k:
        raise ValueError(f"npu_quant_matmul: x2 {list(x2.shape)} has no {k} input features, as x1 has")
    return x2.t()


def _factors(exponents: Tensor) -> Tensor:
    """[r, pairs, 2] as one factor per block [r, blocks]."""
    return mx.e8m0_values(exponents.contiguous().view(torch.uint8)).flatten(1)


def _carries_fp4(x: Tensor, number: int | None, known: set[tuple[torch.dtype, torch.dtype]]) -> bool:
    """Whether an operand is FP4; raises for a dtype and what it carries that are not known."""
    carried = x.dtype if number is None else dtype_of(number)
    if (x.dtype, carried) not in known:
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has no operand {x.dtype} that carries {carried}")
    return carried == _FP4


def _is_e8m0(scale: Tensor | None, number: int | None) -> bool:
    carried = None if scale is None else scale.dtype if number is None else dtype_of(number)
    return carried == torch.float8_e8m0fnu
