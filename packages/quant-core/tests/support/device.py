"""Which device the tests are for, and how closely results of an NPU have to agree with those of a CPU.

ASCEND_QUANT_TEST_DEVICE=npu (`nox -s test-core -- --device npu`) runs the tests of `npu/`, and those alone: the others
are about our own kernels, which compute on CPU on any machine.
"""

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: `cpu` or `npu`.
DEVICE = os.environ.get("ASCEND_QUANT_TEST_DEVICE") or "cpu"

#: The largest difference between integers that two devices round: a tie, or a last bit before it, falls otherwise.
CODES = 1

#: So much of all codes may differ. A wrong formula moves most of them.
SHARE_OF_CODES = 0.02

#: Errors relative to the norm of the whole result: one rounding of each element, and sums in another order.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}

#: Of a whole layer, whose activations are quantised on the way: what one code in fifty that is off by one makes of it.
LAYER = 0.02


def refusal() -> str | None:
    """Why tests cannot run on the device that they are asked to run on, and what to do about it."""
    if DEVICE == "cpu":
        return None
    if DEVICE != "npu":
        return f"ASCEND_QUANT_TEST_DEVICE is {DEVICE!r}, expected cpu or npu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quant_core warns of a torch_npu without CANN, which is told here
        from quant_core.machine import npus
    problem = npus().problem
    if not problem:
        return None
    if "is not installed" in problem:
        todo = "install the torch_npu of this torch (`nox -s test-core -- --device npu` does), and CANN"
    elif "cannot be imported" in problem:
        todo = "install CANN and source its set_env.sh; the torch_npu has to be one for this torch"
    else:
        todo = (
            "`npu-smi info` shows the devices; ASCEND_RT_VISIBLE_DEVICES may hide them, a container needs /dev/davinci*"
        )
    return f"these tests need an NPU, and there is none that can be used: {problem}\n  what to do: {todo}"


def on_npu(arguments: Any) -> Any:
    """Copies of arguments on the NPU. Strides stay as they are: they tell a transposed weight."""

    def copy(tensor: Tensor) -> Tensor:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        memory = tensor.as_strided((span if tensor.numel() else 0,), (1,), tensor.storage_offset())
        return memory.to("npu").as_strided(tensor.shape, tensor.stride())

    return tree_map_only(Tensor, copy, arguments)


def disagreement(found: Tensor, expected: Tensor, relative: float | None = None) -> str | None:
    """How a result of an NPU differs from ours by more than it may; None if it does not."""
    found = found.cpu()
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{tuple(found.shape)} {found.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    if not expected.dtype.is_floating_point or expected.element_size() == 1:
        return _disagreeing_codes(found, expected)
    allowed = RELATIVE[expected.dtype] if relative is None else relative
    largest = torch.finfo(
        expected.dtype
    ).max  # whether a device has infinity beyond it is asked in npu/test_unknowns.py
    theirs, ours = (tensor.double().clamp(-largest, largest) for tensor in (found, expected))
    error = (theirs - ours).norm() / ours.norm().clamp(min=1e-30)
    return None if float(error) <= allowed else f"relative error {float(error):.2e}, allowed are {allowed:.0e}"


def _disagreeing_codes(found: Tensor, expected: Tensor) -> str | None:
    packed = expected.dtype in (torch.int32, torch.uint8) or expected.dtype.is_floating_point
    if packed:  # several codes in one element: only whether they are equal can be said
        largest, share = 0, float((found.view(torch.uint8) != expected.view(torch.uint8)).float().mean())
    else:
        steps = (found.long() - expected.long()).abs()
        largest, share = int(steps.max()) if steps.numel() else 0, float((steps > 0).float().mean())
    if largest <= CODES and share <= SHARE_OF_CODES:
        return None
    return f"{share:.1%} of the codes differ, by up to {largest or 'an unknown number of'} steps"
