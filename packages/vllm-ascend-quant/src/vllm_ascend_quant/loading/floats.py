"""Float layers: vLLM loads them itself, and checks neither that all parts came nor that nothing was cut off.

A fused layer whose k has no bias in the files reports its bias as loaded, and two thirds of it are; experts as loaded
when one of them is. Of a tensor with more rows than the layer has, vLLM takes the first ones.
"""

import math
from collections import Counter
from typing import cast

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from quant_core import LoadError, QuantFormat
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.linear import full_sizes
from vllm_ascend_quant.methods.parameter import AscendParameter
from vllm_ascend_quant.served_model import ServedModel


def linear_layers(model: nn.Module) -> dict[str, LinearBase]:
    """The linear layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}


def filled_in_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by path whose parameters are filled by several tensors: linear ones and experts."""
    experts = compat.expert_layer_class()
    found = {path: module for path, module in model.named_modules() if isinstance(module, experts)}
    return {**linear_layers(model), **found}


def check_rows(model: nn.Module, served: ServedModel, source: QuantFormat) -> None:
    """Refuse tensors of the checkpoint that is about to be loaded which have more rows than the model takes.

    Raises:
        LoadError: lists tensor, file, found and expected rows.

    """
    modules = source.modules
    takers = Counter(module for quant in served.layers.values() for module in set(quant.modules))
    wrong = []
    for path, layer in linear_layers(model).items():
        quant = served.layers.get(path)
        if quant is None or quant.quant_type is not None:
            continue
        sizes = full_sizes(layer, _local_sizes(layer))
        owners = quant.modules if len(quant.modules) == len(sizes) else quant.modules[:1] * len(sizes)
        for module in dict.fromkeys(owners):
            rows = sum(size for owner, size in zip(owners, sizes, strict=True) if owner == module)
            form = modules.get(module)
            if takers[module] > 1 or form is None:
                continue  # one of several layers takes its part
            for suffix, others in (("weight", (layer.input_size,)), ("bias", ())):
                tensor = form.tensors.get(suffix)
                if tensor is not None and tensor.shape[1:] == others and tensor.shape[0] > rows:
                    shape = list(tensor.shape)
                    wrong.append(f"{tensor.name} in {tensor.file} is {shape}, the model takes {[rows, *others]}")
    if wrong:
        raise LoadError(
            f"{len(wrong)} float tensors are larger than the layers of the model, and vLLM would cut them off",
            where=source.folder.path,
            found=listing(wrong),
            todo="check that config.json describes the model whose weights these are",
        )


def mark_unfilled(model: nn.Module) -> None:
    """Fill what is about to be loaded with NaN."""
    for layer in filled_in_parts(model).values():
        for param in _float_parameters(layer).values():
            param.data.fill_(math.nan)


def unfilled(model: nn.Module, served: ServedModel) -> list[str]:
    """The tensors of which nothing, or only NaN, came; by the members' names where they are known."""
    names = []
    for path, layer in filled_in_parts(model).items():
        modules = served.layers[path].modules if path in served.layers else ()
        for suffix, param in _float_parameters(layer).items():
            empty = param.data.isnan().reshape(len(param), -1).any(dim=1)
            if not bool(empty.any()):
                continue
            if not isinstance(layer, LinearBase):
                experts = listing(map(str, empty.nonzero().flatten().tolist()))
                names.append(f"{path}.{suffix} of this rank's experts {experts}")
                continue
            sizes = _local_sizes(layer)
            if len(modules) == len(sizes) and sum(sizes) == len(empty):
                parts = zip(modules, empty.split(sizes), strict=True)
                names += [f"{module}.{suffix}" for module, part in parts if bool(part.any())]
            else:
                names.append(f"{path}.{suffix}")
    return names


def _local_sizes(layer: LinearBase) -> list[int]:
    return cast(list[int], layer.output_partition_sizes)


def _float_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    own = layer.named_parameters(recurse=False)
    return {n: p for n, p in own if not isinstance(p, AscendParameter) and p.is_floating_point() and p.numel()}
