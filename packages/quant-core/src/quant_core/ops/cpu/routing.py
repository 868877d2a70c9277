"""Tokens to the experts that they chose: a row for each choice, sorted by expert (docs/operators.md, section 9)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.ops.cpu.choices import by_expert
from quant_core.ops.cpu.groups import COUNTS, CUMULATIVE, PAIRS
from quant_core.ops.cpu.mx import npu_dynamic_mx_quant
from quant_core.ops.cpu.quantize import npu_dynamic_quant, saturated
from quant_core.ops.dtypes import FLOAT4_E2M1, FLOAT8_E4M3, FLOAT8_E5M2

#: What `quant_mode` makes of the rows.
NOTHING, STATIC, DYNAMIC = -1, 0, 1
#: The target of microscaling modes.
MICROSCALED = {2: FLOAT8_E5M2, 3: FLOAT8_E4M3, 9: FLOAT4_E2M1}


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row for each choice of an expert, sorted by expert, and of one expert by token; quantised on request.

    Args:
        x: [tokens, H].
        expert_idx: int32 or int64 [tokens, K].
        scale: for quant_mode -1 of tokens that are quantised already, [tokens, ...]: it goes along with them; 0: [1];
            1: what x is multiplied with first, [1, H] or [experts, H].
        offset: for quant_mode 0: [1].
        active_num: rows to return; none or less for all. The device wants the number of tokens · K here; as that
            would fix the number of tokens of a compiled model, nothing is better.
        expert_capacity: for drop_pad_mode 1.
        expert_num: of all experts.
        drop_pad_mode: 0; 1 is not supported on CPU.
        expert_tokens_num_type: how the rows of each expert are told: 0 where they end, 1 how many there are, 2 pairs
            of an expert that has some and how many, filled up with (0, 0).
        expert_tokens_num_flag: whether they are told.
        quant_mode: -1 none; 0 static, rint(x * scale + offset) in float16; 1 dynamic, see npu_dynamic_quant; 2, 3 and
            9 microscaled to E5M2, E4M3 and FP4, see npu_dynamic_mx_quant.
        active_expert_range: the experts that are here, half open; without it, all of expert_num.
        row_idx_type: 0: where each choice went; 1: which choice each row is.
        x_dtype: what x carries: FP4 in uint8.

    Returns:
        expanded_x [tokens · K, ...]: rows behind those of experts that are here are zero, which the device leaves as
            they are.
        expanded_row_idx int32 [tokens · K]: with row_idx_type 0, -1 for choices of experts that are not here, an id of
            -1 among them.
        expert_tokens int64 [experts here], or [expert_num, 2].
        expanded_scale: of the rows; zeros if there is none, as the device has it in these modes too.

    Raises:
        NotImplementedError: for modes that the CPU kernel does not have.
        ValueError: for shapes that do not fit together.

    """
    told = expert_tokens_num_type if expert_tokens_num_flag else None
    _check(x, expert_idx, expert_num, told, active_expert_range, drop_pad_mode, quant_mode)
    first, last = active_expert_range or (0, expert_num)
    order = by_expert(expert_idx, first, last - first if last >= 0 else None)
    rows = expert_idx.numel() if active_num <= 0 else min(active_num, expert_idx.numel())
    taken = order.choices[: min(rows, order.active)]
    tokens = taken // expert_idx.shape[1]
    if quant_mode == DYNAMIC and scale is not None and len(scale) == len(order.counts) > 1:
        experts = torch.arange(len(scale), device="cpu").repeat_interleave(order.counts)[: len(taken)]
        smoothed = _gathered(x, tokens, rows).to(torch.float32) * _gathered(scale, experts, rows)
        expanded, scales = npu_dynamic_quant(smoothed)
    else:
        # A token is quantised once, for all the experts that it chose.
        values, of_tokens = _quantised(x, quant_mode, scale, offset)
        expanded, scales = _gathered(values, tokens, rows), _scales(of_tokens, tokens, rows, quant_mode, x, x_dtype)
    index = order.choices.to(torch.int32) if row_idx_type == 1 else order.places
    return expanded, index, _told(order.counts, told, first, expert_num), scales


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """One row for each choice, sorted by expert.

    Args:
        tokens: [tokens, H].
        indices: the chosen experts [tokens, K], or [tokens] of one each.
        num_out_tokens: rows to return; None or 0 for all, if negative that many less.
        padded_mode: not supported on CPU.

    Returns:
        The rows, and int32 [tokens · K]: where each choice went.

    Raises:
        NotImplementedError: for padded_mode.

    """
    if padded_mode:
        raise NotImplementedError("npu_moe_token_permute: the CPU kernel has no padded_mode")
    choices = torch.argsort(indices.flatten(), stable=True)
    positions = torch.empty_like(choices, dtype=torch.int32)
    positions[choices] = torch.arange(len(choices), dtype=torch.int32, device="cpu")
    count = num_out_tokens or 0
    taken = choices[:count] if count else choices
    width = indices.shape[1] if indices.dim() == 2 else 1
    return tokens.index_select(0, taken // width), positions


def _check(
    x: Tensor,
    expert_idx: Tensor,
    expert_num: int,
    told: int | None,
    active_expert_range: Sequence[int],
    drop_pad_mode: int,
    quant_mode: int,
) -> None:
    if drop_pad_mode or quant_mode not in (NOTHING, STATIC, DYNAMIC, *MICROSCALED):
        raise NotImplementedError(
            f"npu_moe_init_routing_v2: the CPU kernel has no drop_pad_mode {drop_pad_mode} with quant_mode {quant_mode}"
        )
    if x.dim() != 2 or expert_idx.dim() != 2 or len(x) != len(expert_idx):
        raise ValueError(
            f"npu_moe_init_routing_v2: x is {list(x.shape)} and expert_idx {list(expert_idx.shape)}, expected "
            "[tokens, H] and [tokens, K]"
        )
    if active_expert_range and not 0 <= active_expert_range[0] < active_expert_range[1]:
        raise ValueError(f"npu_moe_init_routing_v2: active_expert_range {list(active_expert_range)} has no expert")
    if told not in (None, CUMULATIVE, COUNTS, PAIRS):
        raise ValueError(f"npu_moe_init_routing_v2: expert_tokens_num_type is {told}, expected 0, 1 or 2")
    if told is not None and expert_num < 0 and (told == PAIRS or not active_expert_range):
        raise ValueError(
            f"npu_moe_init_routing_v2: expert_tokens of type {told} are wanted, but no expert_num is given"
        )


def _quantised(x: Tensor, quant_mode: int, scale: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens as quant_mode says, and their scales."""
    if quant_mode == DYNAMIC:
        if scale is not None and scale.shape != (1, x.shape[1]):
            raise ValueError(
                f"npu_moe_init_routing_v2: scale is {list(scale.shape)}, expected [1, {x.shape[1]}] or a row for "
                "each expert that is here"
            )
        return npu_dynamic_quant(x, smooth_scales=None if scale is None else scale[0])
    if quant_mode in MICROSCALED:
        return npu_dynamic_mx_quant(x, dst_type=MICROSCALED[quant_mode])
    if quant_mode == NOTHING:
        return x, scale
    if scale is None or offset is None:
        raise ValueError("npu_moe_init_routing_v2: quant_mode 0 needs scale and offset")
    half = torch.float16
    return saturated((x.to(half) * scale.to(half) + offset.to(half)).to(torch.float32)).to(torch.int8), None


def _gathered(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Some rows, and zeros behind them."""
    if len(index) == rows and values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        return values.index_select(0, index)
    gathered = torch.empty(rows, *values.shape[1:], dtype=values.dtype, device="cpu")
    # Bytes go everywhere: torch has no index_select of some eight-bit floats.
    source, target = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (values, gathered))
    torch.index_select(source, 0, index, out=target[: len(index)])
    target[len(index) :] = 0
    return gathered


def _scales(
    of_tokens: Tensor | None, tokens: Tensor, rows: int, quant_mode: int, x: Tensor, x_dtype: int | None
) -> Tensor:
    if of_tokens is None:
        return torch.zeros(() if quant_mode == STATIC else (rows,), dtype=torch.float32, device="cpu")
    scales = _gathered(of_tokens, tokens, rows)
    if quant_mode in MICROSCALED:
        scales = scales.view(torch.float8_e8m0fnu)
        return scales if MICROSCALED[quant_mode] == FLOAT4_E2M1 else scales.flatten(1)
    exponents = x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) or x_dtype == FLOAT4_E2M1
    return scales.view(torch.float8_e8m0fnu) if exponents else scales


def _told(counts: Tensor, kind: int | None, first: int, expert_num: int) -> Tensor:
    if kind is None:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    if kind == COUNTS:
        return counts.clone()
    if kind == CUMULATIVE:
        return counts.cumsum(0)
    pairs = torch.zeros(expert_num, 2, dtype=torch.int64, device="cpu")
    chosen = counts.nonzero()[:, 0]
    pairs[: len(chosen)] = torch.stack([chosen + first, counts[chosen]], dim=1)
    return pairs
