"""Float layers: vLLM loads them itself, and checks neither that all parts came nor that nothing was cut off.

A fused layer whose k has no bias in the files reports its bias as loaded, and two thirds of it are; experts as loaded
when one of them is. Of a tensor with more rows than the layer has, vLLM takes the first ones.

What vLLM does with the original model's float tensors is its own affair otherwise: whatever it drops on purpose, cuts,
or replaces by a value of its own, it does with the unquantised model too.
"""

import math
from collections import Counter
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LoadError, QuantFormat
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.linear import full_sizes
from vllm_ascend_quant.methods.parameter import AscendParameter
from vllm_ascend_quant.served_model import ServedModel

_FLOAT_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

#: What allocates memory and does not write to it.
_UNWRITTEN = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}


def linear_layers(model: nn.Module) -> dict[str, LinearBase]:
    """The linear layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}


def filled_in_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by path whose parameters are filled by several tensors: linear ones and experts."""
    experts = compat.expert_layer_class()
    found = {path: module for path, module in model.named_modules() if isinstance(module, experts)}
    return {**linear_layers(model), **found}


def vocabulary_layers(model: nn.Module) -> dict[str, VocabParallelEmbedding]:
    """The embeddings and heads by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)}


def check_rows(model: nn.Module, served: ServedModel, source: QuantFormat) -> None:
    """Refuse tensors of the checkpoint that is about to be loaded which have more rows than the model takes.

    Asked of the parts of the model in which something is quantised: config.json contradicts what was quantised then. A
    tower or projector that is float as a whole is what it was before, and vLLM cuts some of them on purpose.

    Raises:
        LoadError: lists tensor, file, found and expected rows.

    """
    modules = source.modules
    takers = Counter(module for quant in served.layers.values() for module in set(quant.modules))
    touched = {path.partition(".")[0] for path, quant in served.layers.items() if quant.quant_type is not None}
    wrong = []
    for path, layer in linear_layers(model).items():
        quant = served.layers.get(path)
        if quant is None or quant.quant_type is not None or path.partition(".")[0] not in touched:
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


def check_finite(name: str, tensor: torch.Tensor, source: QuantFormat) -> None:
    """Refuse a float tensor with a value that is no number: the model would answer, and wrongly.

    Raises:
        LoadError: names the tensor and its file, and gives the first such value and where it is.

    """
    if tensor.dtype not in _FLOAT_DTYPES or not tensor.numel():
        return
    if math.isfinite(sum(map(float, tensor.aminmax()))):  # NaN wins both; no mask of the tensor's size is made
        return
    finite = tensor.isfinite()
    position = (~finite).nonzero()[0].tolist()
    file = source.folder.tensors[name].file if name in source.folder.tensors else source.folder.path
    raise LoadError(
        f"{name} holds values that are not finite: {int((~finite).sum())} of {tensor.numel()}",
        where=file,
        found=f"{float(tensor[tuple(position)])} at {position}",
        expected="finite numbers",
        todo="download the file again if it is damaged; otherwise quantise the model again",
    )


class MarkedMemory(TorchFunctionMode):
    """While a model is built, memory that is allocated and not written to holds NaN.

    So what neither the model nor its loader fills is seen afterwards, while a value that the model begins with, and
    that vLLM serves where the files have none, stays what it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The tensor that is asked for, marked if nothing is in it yet."""
        made = func(*args, **(kwargs or {}))
        if func in _UNWRITTEN and made.dtype in _FLOAT_DTYPES:
            with torch.no_grad():
                made.fill_(math.nan)
        return made


def unfilled(model: nn.Module, served: ServedModel) -> tuple[list[str], list[str]]:
    """The tensors of which nothing, or only a part, came: those of absent members of fused layers, and the rest."""
    members: list[str] = []
    names = []
    seen: set[nn.Parameter] = set()  # a router's bias belongs to the experts, too
    for path, layer in filled_in_parts(model).items():
        modules = served.layers[path].modules if path in served.layers else ()
        for suffix, param in _float_parameters(layer).items():
            empty = _unwritten_rows(param.data)
            if param in seen or not bool(empty.any()):
                continue
            seen.add(param)
            if not isinstance(layer, LinearBase):
                experts = listing(map(str, empty.nonzero().flatten().tolist()))
                names.append(f"{path}.{suffix} of this rank's experts {experts}")
                continue
            sizes = _local_sizes(layer)
            if len(modules) == len(sizes) and sum(sizes) == len(empty):
                parts = zip(modules, empty.split(sizes), strict=True)
                found = [f"{module}.{suffix}" for module, part in parts if bool(part.any())]
                (members if len(found) < len(sizes) else names).extend(found)
            elif path in served.absent_members:
                members += [f"{module}.{suffix}" for module in served.absent_members[path]]
            else:
                names.append(f"{path}.{suffix}")
    return members, names


def _unwritten_rows(values: torch.Tensor) -> torch.Tensor:
    """Which rows, or experts, hold NaN. A maximum is NaN if anything is, and no mask of the weight's size is made."""
    return (values.amax(dim=tuple(range(1, values.dim()))) if values.dim() > 1 else values.reshape(-1)).isnan()


def _local_sizes(layer: LinearBase) -> list[int]:
    return cast(list[int], layer.output_partition_sizes)


def _float_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    own = layer.named_parameters(recurse=False)
    return {n: p for n, p in own if not isinstance(p, AscendParameter) and p.is_floating_point() and p.numel()}
