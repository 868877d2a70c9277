"""Quantised linear layers of every registered type, made as the tests make them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from quant_core import AscendLinearScheme
from quant_core.schemes.registry import list_schemes

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "quant-core" / "tests" / "support"))
from workbench import Workbench


def linear_types() -> Iterator[tuple[str, type[AscendLinearScheme]]]:
    """Name and class of each type for linear layers."""
    for (quant_type, layer_type), scheme_class in sorted(list_schemes().items()):
        if layer_type == "linear" and issubclass(scheme_class, AscendLinearScheme):
            yield quant_type, scheme_class


def make_layer(
    scheme_class: type[AscendLinearScheme], size: int, dtype: torch.dtype
) -> tuple[AscendLinearScheme, nn.Module]:
    """A scheme and its processed layer with `size` input and output features, random weights."""
    bench = Workbench()
    stored = bench.draw(scheme_class, size, size)
    return bench.serve(scheme_class, [stored], dtype=dtype, sizes=[size], inputs=size)


def run_time_bytes(layer: nn.Module) -> int:
    """Bytes of what the layer holds to compute with."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
