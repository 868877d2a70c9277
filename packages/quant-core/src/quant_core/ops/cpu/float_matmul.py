"""Products of FP8 and FP4 matrices (operators.md, sections 4 and 8)."""

import torch
from torch import Tensor

from quant_core import microscaling as mx
from quant_core.ops.cpu.blocks import product
from quant_core.ops.cpu.decode import Decoder
from quant_core.ops.cpu.mx import LEVEL0
from quant_core.ops.dtypes import dtype_of

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP4 = torch.float4_e2m1fn_x2
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
        x2: [k, n] FP8, or uint8 with x2_dtype FP4: [k / 2, n], packed along k, or [k, n / 2], packed along n.
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
    fp4 = [_is_fp4(x, number) for x, number in ((x1, x1_dtype), (x2, x2_dtype))]
    scales = [_is_e8m0(s, number) for s, number in ((pertoken_scale, pertoken_scale_dtype), (scale, scale_dtype))]
    if target not in _TARGETS or x1.dim() != 2 or x2.dim() != 2 or scales[0] != scales[1] or any(fp4) > scales[0]:
        raise NotImplementedError(
            f"npu_quant_matmul: the CPU kernel has no {x1.dtype} {list(x1.shape)} x {x2.dtype} {list(x2.shape)} with "
            f"E8M0 scales {scales} and output {target}"
        )
    if group_sizes and (not scales[0] or list(group_sizes) not in ([1, 1, 32], [0, 0, 32])):
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has no group_sizes {list(group_sizes)}")
    k = x1.shape[1] * (2 if fp4[0] else 1)
    weight = weight_rows(x2, k, fp4[1])
    rows, decode = Decoder()(x1), Decoder()
    if not scales[0]:
        y = product(rows, weight.shape[0], lambda part: decode(weight[part]))
        return _scaled(y, scale, pertoken_scale, bias).to(target)
    assert pertoken_scale is not None
    pairs = -(-mx.blocks_of(k) // 2)
    expected = [x1.shape[0], pairs, 2], [pairs, weight.shape[0], 2]
    if [list(pertoken_scale.shape), list(scale.shape)] != list(expected):
        raise ValueError(
            f"npu_quant_matmul: pertoken_scale is {list(pertoken_scale.shape)} and scale {list(scale.shape)}, expected "
            f"{expected[0]} and {expected[1]}"
        )
    mx.scale_blocks_(rows, _factors(pertoken_scale))
    exponents = scale.transpose(0, 1)
    y = product(
        rows,
        weight.shape[0],
        lambda part: mx.scale_blocks_(decode(weight[part]), _factors(exponents[part])),
    )
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(target)


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
        x2: [n, k / 2] uint8 or int8, on the device in the NZ layout.
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
    groups, pairs = -(-2 * half // LEVEL0), -(-half // mx.BLOCK)
    found = [list(t.shape) for t in (x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale)]
    expected = [[n, half], [m, groups], [groups, n], [m, pairs, 2], [n, pairs, 2]]
    if found != expected:
        raise ValueError(f"npu_dual_level_quant_matmul: x2 and the scales are {found}, expected {expected}")
    factors = x2_level0_scale.t()

    def decoded(decode: Decoder, codes: Tensor, level0: Tensor, level1: Tensor) -> Tensor:
        blocks = level0.repeat_interleave(LEVEL0 // mx.BLOCK, dim=1)[:, : 2 * pairs]
        return mx.scale_blocks_(decode(codes.view(torch.uint8)), _factors(level1) * blocks)

    rows, decode = decoded(Decoder(), x1, x1_level0_scale, x1_level1_scale), Decoder()
    y = product(rows, n, lambda part: decoded(decode, x2[part], factors[part], x2_level1_scale[part]))
    return (y if bias is None else y.add_(bias.to(torch.float32))).to(target)


def weight_rows(x2: Tensor, k: int, fp4: bool) -> Tensor:
    """A weight [k, n] as codes of its n rows, of FP4 packed along k: [n, k] or [n, k / 2].

    Raises:
        ValueError: for shapes that do not fit together.

    """
    if fp4 and x2.shape[0] == k:
        return mx.pack_e2m1(mx.unpack_e2m1(x2).t())
    if x2.shape[0] * (2 if fp4 else 1) != k:
        raise ValueError(f"npu_quant_matmul: x2 {list(x2.shape)} has no {k} input features, as x1 has")
    return x2.t()


def _scaled(y: Tensor, scale: Tensor, pertoken_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    y.mul_(scale.to(torch.float32))
    if pertoken_scale is not None:
        y.mul_(pertoken_scale.to(torch.float32)[:, None])
    return y if bias is None else y.add_(bias.to(torch.float32))


def _factors(exponents: Tensor) -> Tensor:
    """[r, pairs, 2] as one factor per block [r, blocks]."""
    return mx.e8m0_values(exponents.contiguous().view(torch.uint8)).flatten(1)


def _is_fp4(x: Tensor, number: int | None) -> bool:
    """Whether an operand carries FP4; raises for one that carries neither FP4 nor FP8."""
    carried = x.dtype if number is None else dtype_of(number)
    if carried == _FP4 and x.dtype == torch.uint8:
        return True
    if carried not in _FP8 or x.dtype != carried:
        raise NotImplementedError(f"npu_quant_matmul: the CPU kernel has no operand {x.dtype} that carries {carried}")
    return False


def _is_e8m0(scale: Tensor | None, number: int | None) -> bool:
    carried = None if scale is None else scale.dtype if number is None else dtype_of(number)
    return carried == torch.float8_e8m0fnu
