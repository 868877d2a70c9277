"""Telling whether the float parameters of linear layers were filled, of which vLLM keeps no record.

A fused layer whose k has no bias in the files reports its bias as loaded, and two thirds of it are.
"""

import math
from typing import cast

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.parameter import AscendParameter


def linear_layers(model: nn.Module) -> dict[str, LinearBase]:
    """The linear layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}


def mark_unfilled(model: nn.Module) -> None:
    """Fill what is about to be loaded with NaN."""
    for layer in linear_layers(model).values():
        for param in _float_parameters(layer).values():
            param.data.fill_(math.nan)


def unfilled(model: nn.Module, config: AscendQuantizationConfig) -> list[str]:
    """The tensors of which nothing, or only NaN, came; by the members' names where they are known."""
    names = []
    for path, layer in linear_layers(model).items():
        modules = config.layers[path].modules if path in config.layers else ()
        for suffix, param in _float_parameters(layer).items():
            empty = param.data.isnan().reshape(len(param), -1).any(dim=1)
            sizes = cast(list[int], layer.output_partition_sizes)
            if not bool(empty.any()):
                continue
            if len(modules) == len(sizes) and sum(sizes) == len(empty):
                parts = zip(modules, empty.split(sizes), strict=True)
                names += [f"{module}.{suffix}" for module, part in parts if bool(part.any())]
            else:
                names.append(f"{path}.{suffix}")
    return names


def _float_parameters(layer: LinearBase) -> dict[str, nn.Parameter]:
    own = layer.named_parameters(recurse=False)
    return {n: p for n, p in own if not isinstance(p, AscendParameter) and p.is_floating_point() and p.numel()}
