"""Products of many experts, activated and quantised at once (docs/operators.md, section 6).

Sums of an expert are activated while they are in the cache, and never written for all experts. What comes out is what
npu_grouped_matmul to int32 and npu_dequant_swiglu_quant make of the same operands, to the last bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.ops.cpu.activate_quant import Scales, activate_and_quantise
from quant_core.ops.cpu.activation import silu_of_left
from quant_core.ops.cpu.grouped import grouped_product
from quant_core.ops.cpu.grouped_product import Experts, Operand
from quant_core.ops.cpu.groups import CUMULATIVE, Group, groups_of
from quant_core.ops.cpu.mx import npu_dynamic_mx_quant
from quant_core.ops.dtypes import dtype_of, number_of


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
    """silu(first half) · second half of each expert's product, quantised per token.

    Args:
        x: int8 [m, k].
        weight: [E, k, n] int8, or int4 in int32; n is even.
        group_list: int64 [E], where the rows of each expert end.
        weight_scale: [E, n]; of int4 as npu_grouped_matmul takes it.
        x_scale: float32 [m].
        bias: of int4 weights, float32 [E, n], as npu_grouped_matmul takes it.
        offset: not supported on CPU.

    Returns:
        int8 [m, n / 2], float32 scales [m], and a float32 zero.

    Raises:
        NotImplementedError: for an offset, or a bias of int8 weights.

    """
    if offset is not None:
        raise NotImplementedError("npu_grouped_matmul_swiglu_quant: the CPU kernel has no offset")
    groups = groups_of("npu_grouped_matmul_swiglu_quant", group_list, CUMULATIVE, len(weight), len(x))
    codes, scales = _to_int8(x, [weight], [weight_scale], x_scale, groups, [bias] if bias is not None else None, None)
    return codes, scales, torch.zeros((), dtype=torch.float32, device="cpu")


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
    """silu(first half) · second half of each expert's product, quantised per token or microscaled.

    Args:
        x: as npu_grouped_matmul takes it.
        weight: one tensor [E, k, n]; n is even.
        weight_scale: one tensor, as npu_grouped_matmul takes it.
        x_scale: float32 [m], or MX exponents [m, ceil(k / 64), 2].
        group_list: int64, see groups.py.
        smooth_scale: [E, n / 2] or [E], multiplied before quantising to int8.
        weight_assist_matrix: of int4 weights, float32 [E, n]: the bias of npu_grouped_matmul.
        bias: another name for it.
        dequant_mode: 0 scales per channel and token, 2 MX.
        dequant_dtype: float32.
        quant_mode: 0 per token to int8, 2 microscaled.
        quant_dtype: int8; of MX FP8. How FP4 comes out, torch_npu's own Meta kernel and its sizes disagree about.
        group_list_type: see groups.py.
        tuning_config: a hint for the device.
        x_dtype: as npu_grouped_matmul.
        weight_dtype: as npu_grouped_matmul.
        weight_scale_dtype: E8M0, where scales are uint8.
        x_scale_dtype: as weight_scale_dtype.

    Returns:
        int8 [m, n / 2] and float32 scales [m]; or FP8 [m, n / 2] and exponents [m, ceil(n / 128), 2].

    Raises:
        NotImplementedError: for modes that the CPU kernel does not have.

    """
    modes, target = (dequant_mode or 0, quant_mode or 0), torch.int8 if quant_dtype is None else dtype_of(quant_dtype)
    known = {(0, 0): (torch.int8,), (2, 2): (torch.float8_e4m3fn, torch.float8_e5m2)}
    if dequant_dtype != number_of(torch.float32) or target not in known.get(modes, ()):
        raise NotImplementedError(
            f"npu_grouped_matmul_swiglu_quant_v2: the CPU kernel has no dequant_mode and quant_mode {modes} with "
            f"dequant_dtype {dequant_dtype} and quant_dtype {quant_dtype}"
        )
    count = len(weight[0]) if len(weight) == 1 else len(weight)
    groups = groups_of("npu_grouped_matmul_swiglu_quant_v2", group_list, group_list_type, count, len(x))
    assist = weight_assist_matrix or ([bias] if bias is not None else None)
    if modes == (0, 0):
        return _to_int8(x, weight, weight_scale, x_scale, groups, assist, smooth_scale)
    if smooth_scale is not None or assist is not None:
        raise NotImplementedError(
            "npu_grouped_matmul_swiglu_quant_v2: the CPU kernel has no smooth_scale or bias of MX"
        )
    experts = Experts(
        weight,
        torch.float32,
        scale=weight_scale,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        scale_dtype=weight_scale_dtype,
        per_token_scale_dtype=x_scale_dtype,
    )
    values = silu_of_left(grouped_product(experts, x, x_scale, groups))
    return npu_dynamic_mx_quant(values, dst_type=number_of(target))


def _to_int8(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    groups: Sequence[Group],
    assist: Operand,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each expert's product, activated and quantised per token: codes and scales."""
    experts = Experts(weight, torch.float32, assist, weight_scale)
    plain = experts.multiplies_plainly(x)
    if assist is not None and x.dtype == weight[0].dtype:
        raise NotImplementedError("npu_grouped_matmul_swiglu_quant: the CPU kernel has no bias of int8 weights")
    scales = Scales(
        lambda expert: experts.of(weight_scale, expert) if plain else None,
        x_scale if plain else None,
        lambda expert: None if smooth is None else smooth[expert].reshape(-1),
    )

    def values(batch: Sequence[Group]) -> Tensor:
        if plain:
            return experts.sums(batch, x)
        return torch.cat([experts.product(expert, x[rows], x_scale[rows]) for expert, rows in batch])

    return activate_and_quantise(groups, values, (len(x), weight_scale[0].shape[-1] // 2), silu_of_left, scales)
