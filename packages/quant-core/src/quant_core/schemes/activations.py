"""What lies between the halves of an expert, by the names that vLLM has for it.

A gated one multiplies the activated gate, the first half of its input, by the linear part, the second half; names that
end in `_no_mul` are of experts without a gate. What stands in no table here is an error, never another activation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quant_core.schemes.context import ExpertSizes

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu2": lambda gate: functional.relu(gate).square(),
}

#: a · sigmoid(alpha · a) · (b + beta) with clipped a and b: the values of a and b alternate, or lie side by side.
_CLIPPED = {"swigluoai": True, "swigluoai_uninterleave": False}

_UNGATED = "_no_mul"


def unknown_activation(sizes: ExpertSizes) -> str | None:
    """Why the activation of a layer cannot be computed; None if it can."""
    name = sizes.activation
    if name in _CLIPPED:
        return None if sizes.limit is not None else f"the activation {name!r} needs a limit"
    gate = name.removesuffix(_UNGATED)
    if gate not in _GATES:
        known = [*_GATES, *(f"{known}{_UNGATED}" for known in _GATES), *_CLIPPED]
        return f"the activation {name!r} of these experts is unknown (known are {', '.join(known)})"
    if sizes.limit is not None and name != "silu":
        return f"the activation {name!r} has no limit, and the model gives {sizes.limit}"
    return None


def is_gated(sizes: ExpertSizes) -> bool:
    """Whether experts have a gate beside the linear part."""
    return not sizes.activation.endswith(_UNGATED)


def activate(values: Tensor, sizes: ExpertSizes) -> Tensor:
    """What the second half of the experts is multiplied with.

    Args:
        values: [rows, 2 h] of the first half, [rows, h] without a gate.
        sizes: name the activation and its limits.

    Returns:
        [rows, h] in the dtype of the values; arithmetic is float32.

    """
    name = sizes.activation
    if name in _CLIPPED or sizes.limit is not None:
        return torch.ops.npu.npu_clipped_swiglu(  # type: ignore[no-any-return]
            values, alpha=sizes.alpha, limit=sizes.limit, bias=sizes.beta, interleaved=_CLIPPED.get(name, False)
        )
    if name == "silu":
        return torch.ops.npu.npu_swiglu(values)  # type: ignore[no-any-return]
    gate = _GATES[name.removesuffix(_UNGATED)]
    if not is_gated(sizes):
        return gate(values.to(torch.float32)).to(values.dtype)
    activated, linear = values.to(torch.float32).chunk(2, dim=-1)
    return (gate(activated) * linear).to(values.dtype)
