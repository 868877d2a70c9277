"""The last step between loading and a scheme: what it does not have to know of fused layers and of the files."""

from collections.abc import Iterable

import torch
from torch import nn

from quant_core.errors import LoadError
from quant_core.schemes.context import LinearContext
from quant_core.schemes.layouts import ParamLayout
from quant_core.schemes.params import replace_parameter


def check_shared(context: LinearContext, name: str, copies: torch.Tensor) -> None:
    """Make sure that all members of a layer loaded the same tensor.

    Args:
        context: the layer.
        name: the parameter's suffix.
        copies: [members, ...], what each one loaded; of a stack [layers, members, ...].

    Raises:
        LoadError: names the members that differ.

    """
    stacked = copies if context.stack else copies[None]
    different = [
        module
        for modules, members in zip(context.modules, stacked, strict=True)
        for module, one in zip(modules, members, strict=True)
        if not torch.equal(one, members[0])
    ]
    if different:
        raise LoadError(
            f"{context.name}: the members of this fused layer must store the same {name}, but do not",
            found=", ".join(f"{module}.{name}" for module in different),
            expected=f"what {context.shards[0].name}.{name} holds",
            todo="quantise these members with common activations, or leave them in float",
        )


def hand_over(layer: nn.Module, stored: Iterable[ParamLayout], absent: Iterable[ParamLayout], prefix: str = "") -> None:
    """Give `layer` the tensors that its scheme expects.

    That is one of each shared parameter, one entry per output feature of what holds for several (`per_row`), and zeros
    for what the files lack.

    Zeros are no parameters: an engine's reload would wait for weights of them. `prefix` stands before names on `layer`.
    """
    device = next((param.device for param in layer.parameters()), None)
    for layout in stored:
        name = f"{prefix}{layout.name}"
        if layout.axis is None:
            copies = layer.get_parameter(name).data
            replace_parameter(layer, name, (copies[0] if layout.depth is None else copies[:, 0]).clone())
        elif layout.param.per_row:
            replace_parameter(layer, name, _per_row(layer.get_parameter(name).data, layout))
    for layout in absent:
        name = f"{prefix}{layout.name}"
        if hasattr(layer, name):  # from the last time; a parameter would not give way to a plain tensor
            delattr(layer, name)
        members = None if layout.axis is not None else 0 if layout.depth is None else 1  # the axis of copies
        shape = [size for axis, size in enumerate(layout.shape) if axis != members]
        setattr(layer, name, torch.zeros(shape, dtype=layout.param.dtype, device=device))


def _per_row(values: torch.Tensor, layout: ParamLayout) -> torch.Tensor:
    """What is stored for several output features, once for each: [out, ...], of a stack [layers, out, ...]."""
    axis = 0 if layout.depth is None else 1
    if layout.param.output_dim is None:  # one value of each member
        values = values.unsqueeze(-1)
    repeats = [count for member, rows in enumerate(layout.rows) for count in _rows_of_each(layout, member, rows)]
    counts = torch.tensor(repeats, device=values.device)
    return values.repeat_interleave(counts, dim=axis, output_size=sum(layout.rows))


def _rows_of_each(layout: ParamLayout, member: int, rows: int) -> list[int]:
    """How many of a member's output features each of its indices stands for; the last one may have fewer."""
    step = rows if layout.param.output_dim is None else layout.param.output_step
    where = layout.member(member)
    return [min(step, rows - index * step) for index in range(where.stop - where.start)]
