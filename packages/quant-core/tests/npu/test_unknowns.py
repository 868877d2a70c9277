"""What no document says of the operators that our schemes call (docs/operators.md): each question is asked once.

The first line of each docstring is the question, and the answer of the NPU is printed at the end of the run. What our
CPU kernel answers is a guess; where the NPU answers otherwise the test fails, and kernel and document are to follow.
Not asked, since no scheme of ours needs it: static `npu_dequant_swiglu_quant`, and compressed weights (W8A8SC).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_calls import bf16, f16, numbers, ones
from torch import Tensor

from quant_core.devices import current_device
from quant_core.packing import pack_eights

Ask = Callable[..., tuple[list[Tensor], list[Tensor]]]
Tell = Callable[[str, str], None]

A2, A3 = "910B", "910C"


def number(value: Tensor) -> str:
    """A number in words that can be compared."""
    return f"{float(value):g}"


def test_overflow_of_a_float16_product(ask: Ask, tell: Tell) -> None:
    """npu_quant_matmul, a result beyond float16 is:"""
    full = torch.full((16, 512), 127, dtype=torch.int8)
    (theirs,), (ours,) = ask(
        "npu_quant_matmul", full, full.t().contiguous(), ones(16), pertoken_scale=ones(16), output_dtype=f16
    )
    tell(number(theirs[0, 0]), number(ours[0, 0]))


def test_overflow_inside_flatquant(ask: Ask, tell: Tell) -> None:
    """npu_kronecker_quant, the scale of a matrix whose largest value is beyond float16:"""
    if current_device() == "310P":
        pytest.skip("310P has no npu_kronecker_quant")
    x = torch.zeros(1, 16, 16, dtype=bf16)
    x[0, 0, 0] = 1000.0
    left, right = torch.eye(16, dtype=bf16) * 100, torch.eye(16, dtype=bf16)
    (_, theirs), (_, ours) = ask("npu_kronecker_quant", x, left, right, dst_dtype=torch.int32)
    tell(number(theirs[0]), number(ours[0]))


def experts(x: int, last: int, scale: float, bias: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of one expert with int4 weights in two groups, of 7 and of -7; one input of the second group differs."""
    rows = torch.full((16, 512), x, dtype=torch.int8)
    rows[:, -1] = last
    weight = torch.full((1, 512, 64), 7, dtype=torch.int32)
    weight[:, 256:] = -7
    scales = torch.full((1, 2, 64), scale).view(torch.int32).to(torch.int64)
    return ([rows], [pack_eights(weight)]), {
        **{"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": numbers(16), "output_dtype": bf16},
        **{"scale": [scales], "bias": [torch.full((1, 64), bias)], "per_token_scale": [ones(16)]},
    }


def needs_int8_by_int4() -> None:
    if current_device() not in (A2, A3):
        pytest.skip(f"int8 by int4 experts need a 910B or a 910C, this is a {current_device()}")


def test_partial_sums_of_w4a8_experts(ask: Ask, tell: Tell) -> None:
    """npu_grouped_matmul, W4A8 to bfloat16, 28672 - 28665 in two groups (7: float32, 0 or 16: 16 bits) is:"""
    needs_int8_by_int4()
    arguments, options = experts(24, 23, 1.0, 0.0)  # the device multiplies x - 8: 16, and 15 at the end
    (theirs,), (ours,) = ask("npu_grouped_matmul", *arguments, **options)
    tell(number(theirs[0, 0]), number(ours[0, 0]))


def test_scales_of_w4a8_experts(ask: Ask, tell: Tell) -> None:
    """npu_grouped_matmul, W4A8, 560 · (1 + 7/8 · 2^-10) - 560 (0.479: the whole scale, 0: cut to 19 bits) is:"""
    needs_int8_by_int4()
    # x - 8 is zero but for the last input, which counts -80 · -7 times the scale.
    arguments, options = experts(8, -72, 1 + 7 / 8 * 2.0**-10, -560.0)
    (theirs,), (ours,) = ask("npu_grouped_matmul", *arguments, **options)
    tell(number(theirs[0, 0]), number(ours[0, 0]))


@pytest.mark.parametrize("groups", [1, 4])
def test_offsets_of_weight_only_layers(groups: int, ask: Ask, tell: Tell) -> None:
    """npu_weight_quant_batchmatmul, 1 · (5, offset 3) is (8: the offset is added, 2: subtracted):"""
    x, weight = torch.zeros(16, 256, dtype=bf16), torch.full((256, 64), 5, dtype=torch.int8)
    x[:, 0] = 1.0
    shape = (64,) if groups == 1 else (groups, 64)
    scale, offset = torch.ones(shape, dtype=bf16), torch.full(shape, 3.0, dtype=bf16)
    size = 0 if groups == 1 else 256 // groups
    (theirs,), (ours,) = ask("npu_weight_quant_batchmatmul", x, weight, scale, offset, antiquant_group_size=size)
    tell(number(theirs[0, 0]), number(ours[0, 0]))


def test_sums_over_the_experts_of_a_token(ask: Ask, tell: Tell) -> None:
    """npu_moe_token_unpermute, 256 + 1 + 1 in bfloat16 (258: float32 inside, 256: bfloat16) is:"""
    rows = torch.ones(3, 64, dtype=bf16)
    rows[0] = 256.0
    (theirs,), (ours,) = ask(
        "npu_moe_token_unpermute", rows, numbers(0, 1, 2, dtype=torch.int32), ones(1, 3, dtype=bf16)
    )
    tell(number(theirs[0, 0]), number(ours[0, 0]))


# From here on, a device may refuse what it is asked and be of no use afterwards.


def test_a_choice_without_a_row(ask: Ask, tell: Tell) -> None:
    """npu_moe_token_unpermute, 1 and row -1 of [1, 2, 4] (1: nothing is added, 5: the last row) is:"""
    rows = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 64).contiguous().to(bf16)
    (theirs,), (ours,) = ask("npu_moe_token_unpermute", rows, numbers(0, -1, dtype=torch.int32), ones(1, 2, dtype=bf16))
    tell(number(theirs[0, 0]), number(ours[0, 0]))


def test_a_slot_of_nobody(tell: Tell) -> None:
    """npu_scatter_pa_kv_cache, so many values of the cache are written for slot -1:"""

    def written(device: str) -> str:
        rows = torch.ones(1, 2, 128, dtype=torch.int8, device=device)
        caches = [torch.zeros(4, 128, 2, 128, dtype=torch.int8, device=device) for _ in range(2)]
        slots = torch.tensor([-1], dtype=torch.int32, device=device)
        torch.ops.npu.npu_scatter_pa_kv_cache(rows, rows, *caches, slots, cache_mode="Norm")
        return str(sum(int(cache.cpu().count_nonzero()) for cache in caches))

    tell(written("npu"), written("cpu"))
