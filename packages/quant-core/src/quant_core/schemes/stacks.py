"""From the stored tensors of many equal modules to their run-time form: each as its linear scheme makes it, stacked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import replace_parameter


def take(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What a layer holds under names with a prefix, without it; the layer holds it no more."""
    held = {name: param.data for name, param in layer.named_parameters(recurse=False) if name.startswith(prefix)}
    held |= {n: t for n, t in vars(layer).items() if n.startswith(prefix) and isinstance(t, Tensor)}
    for name in held:
        delattr(layer, name)
    return {name.removeprefix(prefix): tensor for name, tensor in held.items()}


def put(layer: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Give a layer tensors as parameters, under names with a prefix."""
    for name, tensor in tensors.items():
        replace_parameter(layer, f"{prefix}{name}", tensor)


def each_alone(scheme: AscendLinearScheme, stored: dict[str, Tensor]) -> Iterator[tuple[AscendLinearScheme, nn.Module]]:
    """Each layer of a stack by itself: its scheme, and a module with its stored parameters, which are views."""
    for index in range(len(scheme.context.stack)):
        module = nn.Module()
        for name, tensor in stored.items():
            replace_parameter(module, name, tensor[index])
        yield type(scheme).create(one_of(scheme.context, index)), module


def one_of(context: LinearContext, index: int) -> LinearContext:
    """One layer of a stack by itself."""
    first = index * len(context.shards)
    shards = tuple(replace(s, name=name) for s, name in zip(context.shards, context.stack[index], strict=True))
    return replace(context, shards=shards, stored=context.stored[first : first + len(shards)], stack=())


def stacked(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of equal modules under a leading axis, each laid out in memory as it is in one."""
    columns: dict[str, list[Tensor]] = {}
    for module in modules:
        for name, param in module.named_parameters(recurse=False):
            columns.setdefault(name, []).append(param.data)
    return {name: _stack(tensors) for name, tensors in columns.items()}


def _stack(tensors: list[Tensor]) -> Tensor:
    first, distance = tensors[0], tensors[0].numel()
    beside = all(
        tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + index * distance
        and tensor.stride() == first.stride()
        for index, tensor in enumerate(tensors)
    )
    if beside and distance:  # they are views of one tensor that was a stack before: a copy would be a waste
        return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()))
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    memory = torch.stack([tensor.permute(order) for tensor in tensors])
    return memory.permute(0, *(1 + order.index(axis) for axis in range(first.dim())))
