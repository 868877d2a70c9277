"""Every sample call of an operator, on the NPU and by our CPU kernel.

A call that the device refuses fails with what the device says: which sizes and dtypes it takes is known from documents
only. Calls that no product but one has are left out on the others.
"""

from collections.abc import Callable
from typing import Any

import attention_calls
import expert_calls
import operator_calls
import pytest
import torch
from device import disagreement
from torch import Tensor
from torch.utils._pytree import tree_leaves

from quant_core.devices import current_device

EVERY = operator_calls.CALLS | expert_calls.CALLS | attention_calls.CALLS

#: Operators of microscaled values, which the 950 alone has; so it is with FP8, and with FP4 in bytes.
MICROSCALED = ("npu_dynamic_mx_quant", "npu_dynamic_dual_level_mx_quant", "npu_dual_level_quant_matmul")


def needs_950(name: str, arguments: Any) -> bool:
    """Whether a call has values that other products do not know."""
    narrow = {torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}
    leaves = tree_leaves(arguments)
    tensors = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}
    others = {leaf for leaf in leaves if not isinstance(leaf, Tensor)}
    return name in MICROSCALED or bool((tensors | others) & {*narrow, 296})


@pytest.mark.parametrize("label", EVERY)
def test_an_operator_computes_what_our_kernel_does(label: str, ask: Callable[..., tuple[Any, Any]]) -> None:
    name, arguments, options = EVERY[label]
    if needs_950(name, (arguments, options)) and current_device() != "950":
        pytest.skip(f"FP8 and microscaled values need a 950, this is a {current_device()}")
    pairs = zip(*ask(name, *arguments, **options), strict=True)
    # A second output that nobody asked for is empty, or memory as it was.
    assert [said for found, ours in pairs if ours.numel() and (said := disagreement(found, ours))] == []
