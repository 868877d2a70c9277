"""Which product we run on, so that a scheme's limits can be checked before a weight is read.

`910B` (Atlas A2), `910C` (A3), `950` (A5), `310P`, and `cpu` where there is no NPU. `planned_device` answers for a
machine other than the one at hand.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator

from quant_core.errors import LimitError

DEVICES = ("910B", "910C", "950", "310P", "cpu")

_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned_device", default=None)


def current_device() -> str:
    """The product of this machine's NPU, or `cpu`.

    torch_npu is asked only if something imported it already: this function must stay free of side effects.
    """
    planned = _planned.get()
    if planned is not None:
        return planned
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None or not torch_npu.npu.is_available():
        return "cpu"
    return product_of(torch_npu.npu.get_device_name())


def product_of(device_name: str) -> str:
    """The product behind a name as `torch_npu.npu.get_device_name` gives it (`Ascend910B1`, `Ascend910_9382`).

    Raises:
        LimitError: if the name belongs to no product that we know.

    """
    name = device_name.upper().removeprefix("ASCEND")
    # 910_93xx is how CANN names the two-die 910C.
    for mark, product in (("910_93", "910C"), ("910C", "910C"), ("910B", "910B"), ("950", "950"), ("310P", "310P")):
        if name.startswith(mark):
            return product
    raise LimitError(f"unknown Ascend device {device_name!r}", expected=f"one of {', '.join(DEVICES[:-1])}")


@contextlib.contextmanager
def planned_device(product: str) -> Iterator[None]:
    """Within the block, limits are those of `product`.

    Raises:
        LimitError: if there is no such product.

    """
    if product not in DEVICES:
        raise LimitError(f"unknown product {product!r}", expected=f"one of {', '.join(DEVICES)}")
    token = _planned.set(product)
    try:
        yield
    finally:
        _planned.reset(token)
