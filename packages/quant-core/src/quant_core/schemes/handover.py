"""The last step between loading and a scheme: what it does not have to know of fused layers and of the files."""

from collections.abc import Iterable

import torch
from torch import nn

from quant_core.errors import LoadError
from quant_core.schemes.context import LayerContext
from quant_core.schemes.params import ParamLayout, replace_parameter


def check_shared(context: LayerContext, name: str, copies: torch.Tensor) -> None:
    """Make sure that all members of a layer loaded the same tensor.

    Args:
        context: the layer.
        name: the parameter's suffix.
        copies: [members, ...], what each one loaded.

    Raises:
        LoadError: names the members that differ.

    """
    different = [s.name for s, one in zip(context.shards, copies, strict=True) if not torch.equal(one, copies[0])]
    if different:
        raise LoadError(
            f"{context.name}: the members of this fused layer must store the same {name}, but do not",
            found=", ".join(f"{module}.{name}" for module in different),
            expected=f"what {context.shards[0].name}.{name} holds",
            todo="quantise these members with common activations, or leave them in float",
        )


def hand_over(layer: nn.Module, stored: Iterable[ParamLayout], absent: Iterable[ParamLayout]) -> None:
    """Give `layer` the tensors that its scheme expects: one of each shared parameter, zeros for what the files lack.

    Zeros are no parameters: an engine's reload would wait for weights of them.
    """
    device = next((param.device for param in layer.parameters()), None)
    for layout in stored:
        if layout.axis is None:
            replace_parameter(layer, layout.name, layer.get_parameter(layout.name).data[0].clone())
    for layout in absent:
        if hasattr(layer, layout.name):  # from the last time; a parameter would not give way to a plain tensor
            delattr(layer, layout.name)
        shape = layout.shape if layout.axis is not None else layout.shape[1:]
        setattr(layer, layout.name, torch.zeros(shape, dtype=layout.param.dtype, device=device))
