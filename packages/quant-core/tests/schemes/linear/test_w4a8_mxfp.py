"""W4A8_MXFP: what is its own; test_mx.py has the rest."""

from typing import Any

import pytest
import torch
from mx_modules import mxfp4
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core.devices import planned_device
from quant_core.schemes.linear.w4a8_mxfp import AscendW4A8MXFPLinearMethod


class Calls(TorchDispatchMode):
    """Records the calls of the operators of the namespace npu."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            names = [argument.name for argument in func._schema.arguments]
            self.recorded[func.__name__] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return func(*args, **(kwargs or {}))


def test_how_the_device_is_called(workbench: Any) -> None:
    """What the CPU kernels cannot tell apart: a layout for FP4 beside FP8, and no bias for the operator."""
    float8_e4m3fn = 24  # what an int argument receives for torch.float8_e4m3fn
    with planned_device("950"), Calls() as calls:
        scheme, layer = workbench.serve(AscendW4A8MXFPLinearMethod, [mxfp4(8, 64)], sizes=[8], inputs=64)
        scheme.apply(layer, torch.randn(3, 64), torch.randn(8))
    cast, product = (calls.recorded[f"{name}.default"] for name in ("npu_format_cast", "npu_quant_matmul"))
    assert (cast["acl_format"], cast["customize_dtype"], cast["input_dtype"]) == (29, float8_e4m3fn, 296)
    assert (product.get("x1_dtype"), product["x2_dtype"], product["group_sizes"]) == (None, 296, [0, 0, 32])
    assert product.get("bias") is None


@pytest.mark.parametrize(("device", "packed"), [("950", 2), ("cpu", 1)])
def test_one_layer_of_memory(workbench: Any, device: str, packed: int) -> None:
    """Half a byte per value, on CPU a whole one, and one byte per 32 of them."""
    with planned_device(device):
        _, layer = workbench.serve(AscendW4A8MXFPLinearMethod, [mxfp4(64, 128)], sizes=[64], inputs=128)
    assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) == 64 * 128 // packed + 64 * 128 // 32
