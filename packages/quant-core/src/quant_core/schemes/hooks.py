"""Asking a scheme's `get_*` hooks what is stored.

A hook returns declarations (`Param`) or, as schemes written for vllm-ascend do, plain tensors. A plain tensor says
neither how it is cut nor what the files hold. The first follows from the hook that returned it, by vllm-ascend's
custom; as to the second, the files may hold another floating dtype, or no such tensor.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import RegistrationError
from quant_core.schemes.params import Param

#: The axes (output, input) of the plain tensors that a hook returns.
_AXES: dict[str, tuple[int | None, int | None]] = {
    "get_weight": (0, 1),
    "get_pertensor_param": (None, None),
    "get_perchannel_param": (0, None),
    "get_pergroup_param": (0, 1),
}


def call_hook(
    hook: Callable[..., Mapping[str, Any]], arguments: tuple[Any, ...], sizes: tuple[int, int], row_parallel: bool
) -> dict[str, Param]:
    """What one hook of a linear scheme declares, by suffix.

    Args:
        hook: one of the four `get_*` hooks.
        arguments: what it is called with.
        sizes: (input, output) features of the module.
        row_parallel: told to a hook that takes `layer_type`.

    Raises:
        RegistrationError: if it returns something that is neither a declaration nor a tensor.

    """
    layer_type = {"layer_type": "row" if row_parallel else "others"}
    named = layer_type if "layer_type" in inspect.signature(hook).parameters else {}
    with torch.device("meta"):  # plain hooks allocate
        returned = hook(*arguments, **named)
    # Names that begin with an underscore tell vllm-ascend how a weight is packed, which here follows from the sizes.
    return {name: _declared(hook, name, v, sizes) for name, v in returned.items() if not name.startswith("_")}


def _declared(hook: Callable[..., Any], name: str, value: Any, sizes: tuple[int, int]) -> Param:
    if isinstance(value, Param):
        return value
    if not isinstance(value, Tensor):
        raise RegistrationError(
            f"{hook.__qualname__} returns {name!r} as {type(value).__name__}",
            expected="a quant_core.Param, or a tensor of the stored shape and dtype",
        )
    output_dim, input_dim = _AXES[hook.__name__]
    shape, (input_size, output_size) = tuple(value.shape), sizes
    if not shape or output_dim is None:
        return Param(shape, value.dtype, shared=True, plain=True)
    if input_dim is not None and (len(shape) < 2 or shape[1] == 1 or shape[1] > input_size):
        input_dim = None  # one group, which all ranks hold
    return Param(
        shape,
        value.dtype,
        output_dim=output_dim,
        input_dim=input_dim,
        output_step=max(1, output_size // max(1, shape[0])),
        input_step=1 if input_dim is None else -(-input_size // shape[1]),
        plain=hook.__name__ != "get_weight",
    )
