"""`save_sharded_state` and `--load-format sharded_state`: a model's parameters as each rank holds them at run time.

vLLM saves a model's parameters after they were processed and loads them before. For our layers that cannot work by
itself: processing changes shapes, must not happen twice, and needs to know what the checkpoint stored. So the folder
also gets the names, shapes and dtypes of the checkpoint's tensors, and a model is processed before it is filled.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group, get_world_group
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from quant_core import CheckpointFolder, LimitError, LoadError
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.files.saved_folder import STORED
from vllm_ascend_quant.methods.cache import AscendKVCacheMethod
from vllm_ascend_quant.methods.linear import AscendLinearMethod, stored_parameters


def save(original: Callable[..., None], checkpoint: CheckpointFolder, model: nn.Module, path: str) -> None:
    """Let vLLM save the parameters of a model, and add what is needed to load them again.

    Raises:
        LimitError: if the model's parameters are not all that it computes with, or this vLLM would lose some.

    """
    _check_complete(model)
    if get_pp_group().world_size > 1 and not compat.saves_pipelines():
        raise LimitError(
            "this vLLM cannot save the state of a pipeline: its stages would be written over each other",
            found=f"pipeline_parallel_size {get_pp_group().world_size}",
            todo="save with pipeline_parallel_size 1, or with a newer vLLM",
        )
    with _contiguous(model):
        original()
    if get_world_group().is_first_rank:
        _describe(checkpoint, Path(path))


def load(original: Callable[..., None], loader: Any, model: nn.Module) -> None:
    """Bring our layers into their run-time form, so that vLLM can copy a saved state into it.

    Raises:
        LoadError: if a saved tensor does not fit.

    """
    for layer, method in _layers(model).values():
        for param in stored_parameters(layer).values():
            initialize_single_dummy_weight(param)
            compat.make_up(param)
        method.make_run_time_form(layer)
        method.restored = True
    with _contiguous(model):
        loader.iterate_over_files = _fitting(loader.iterate_over_files, model)
        original()


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, AscendLinearMethod | AscendKVCacheMethod]]:
    methods = ((path, module, getattr(module, "quant_method", None)) for path, module in model.named_modules())
    ours = (AscendLinearMethod, AscendKVCacheMethod)
    return {path: (module, method) for path, module, method in methods if isinstance(method, ours)}


def _check_complete(model: nn.Module) -> None:
    packed = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LinearBase) and any(param.numel() == 0 for param in module.parameters(recurse=False))
    ]
    if packed:
        raise LimitError(
            f"{len(packed)} float layers hold no weights that could be saved: {listing(packed)}",
            found="vLLM packs float weights for the CPU and drops what they were packed from; it saves no float model "
            "there either",
            todo="serve the checkpoint itself",
        )
    hidden = [
        f"{path}.{name}"
        for path, (layer, method) in _layers(model).items()
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor) and name not in method.absent
    ]
    if hidden:
        raise LimitError(
            f"{len(hidden)} tensors that layers compute with are no parameters, and would not be saved: "
            f"{listing(hidden)}",
            todo="make them parameters in the scheme's process_weights_after_loading, or serve the checkpoint itself",
        )


def _describe(checkpoint: CheckpointFolder, target: Path) -> None:
    """Write what the checkpoint stored, and copy its JSON files if they are not there yet."""
    stored = {t.name: [t.file, str(t.dtype).removeprefix("torch."), t.shape] for t in checkpoint.tensors.values()}
    (target / STORED).write_text(json.dumps(stored, indent=0), encoding="utf-8")
    for name in checkpoint.files("*.json"):
        if not (name.endswith(".index.json") or (target / name).exists()):
            shutil.copyfile(checkpoint.path / name, target / name)


@contextlib.contextmanager
def _contiguous(model: nn.Module) -> Iterator[None]:
    """While it lasts, transposed parameters are what they are in memory: neither vLLM nor safetensors take views."""
    views = []
    for layer, _ in _layers(model).values():
        for name, param in layer.named_parameters(recurse=False):
            memory = param.data.permute(sorted(range(param.dim()), key=param.stride, reverse=True))
            if not param.is_contiguous() and memory.is_contiguous():
                views.append((layer, name, param))
                layer._parameters[name] = nn.Parameter(memory, requires_grad=False)
    try:
        yield
    finally:
        for layer, name, param in views:
            layer._parameters[name] = param


def _fitting(
    original: Callable[..., Iterable[tuple[str, torch.Tensor]]], model: nn.Module
) -> Callable[..., Iterator[tuple[str, torch.Tensor]]]:
    """The same stream, whose tensors are compared first: vLLM fills a larger parameter in part, with a warning."""
    takers = {
        f"{path}.{name}": param
        for path, (layer, _) in _layers(model).items()
        for name, param in layer.named_parameters(recurse=False)
    }

    def iterate(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in original(*args):
            param = takers.get(name)
            if param is not None and (param.shape, param.dtype) != (tensor.shape, tensor.dtype):
                raise LoadError(
                    f"the saved {name} does not fit the layer",
                    found=f"{_name(tensor.dtype)} {list(tensor.shape)}",
                    expected=f"{_name(param.dtype)} {list(param.shape)}",
                    todo="load with the dtype and parallel sizes that the state was saved with. Static types whose "
                    "fused members have input scales of their own cannot be saved: serve the checkpoint itself",
                )
            yield name, tensor

    return iterate


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
