"""Seeing that everything was loaded, at the first load and at every reload.

vLLM checks this for unquantised models only: a quantised one starts and answers nonsense when a tensor is absent.
"""

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from quant_core import LoadError
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.naming import ModelPaths
from vllm_ascend_quant.parameter import AscendParameter


@dataclass
class Loading:
    """What is known about the loading of one model.

    Attributes:
        config: the model's quantisation config.
        called: whether the model's `load_weights` was called; it is not for made-up weights.
        names: the parameters that the last call of the model's `load_weights` reported; None before the first call or
            where a model does not report.
        expected: the parameters that the first load filled, each by all its names.
        biases: `.bias` tensors without a place in the model when it was built, and the modules where they belong.

    """

    config: AscendQuantizationConfig
    called: bool = False
    names: set[str] | None = None
    expected: frozenset[frozenset[str]] = frozenset()
    biases: dict[str, list[str]] = field(default_factory=dict)


_loadings: "weakref.WeakKeyDictionary[nn.Module, Loading]" = weakref.WeakKeyDictionary()


def config_of(model: nn.Module) -> AscendQuantizationConfig | None:
    """The config of a model that `watch_loading` was called for."""
    loading = _loadings.get(model)
    return None if loading is None else loading.config


def watch_loading(model: nn.Module, config: AscendQuantizationConfig, model_paths: ModelPaths) -> None:
    """Take note of what the model's `load_weights` reports from now on."""
    loading = Loading(config, biases=_bias_places(config, model_paths))
    _loadings[model] = loading
    original: Any = model.load_weights

    @functools.wraps(original)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        loading.called = True
        loading.names = None if loaded is None else set(loaded)
        return loaded

    model.load_weights = load_weights  # type: ignore[assignment]


def _bias_places(config: AscendQuantizationConfig, model_paths: ModelPaths) -> dict[str, list[str]]:
    assert config.format is not None
    owner = {module: path for path, quant in config.layers.items() for module in quant.modules}
    return {
        module: [owner[module]] if module in owner else model_paths.paths_of(module)
        for module, form in config.format.folder.modules.items()
        if form.has("bias")
    }


def check_loaded(model: nn.Module) -> None:
    """After the first load, before processing.

    Raises:
        LoadError: lists the parameters that nothing was loaded into, or tensors that the model has no place for.

    """
    loading = _loadings[model]
    config = loading.config
    if loading.called:
        _check_biases(model, loading)
    if loading.names is None:
        return
    absent = []
    expected = []
    for names, param in _parameters_with_names(model):
        path, _, last = names[0].rpartition(".")
        if _exempt(model.get_submodule(path), param):
            continue
        # Quantised parameters keep their own record; a float layer that was found in the files is loaded from there.
        if isinstance(param, AscendParameter) or not loading.names.isdisjoint(names):
            expected.append(frozenset(names))
        elif last != "weight" or not any(name.rpartition(".")[0] in config.layers for name in names):
            absent.append(names[0])
    if absent:
        raise LoadError(
            f"{len(absent)} parameters of the model were not loaded: {listing(absent)}",
            where=config.format.folder.path if config.format else None,
            found=_layers_hint(config),
            todo="check that config.json describes the model whose weights these are, and that no file is missing",
        )
    loading.expected = frozenset(expected)
    loading.names = None


def _check_biases(model: nn.Module, loading: Loading) -> None:
    """Refuse `.bias` tensors for which the model has no parameter: vLLM's loaders drop them without a word.

    Asked after loading, because a loader may make the parameter when it meets the tensor.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    lost = []
    for module, places in loading.biases.items():
        there = [modules[path] for path in places if path in modules]
        if there and all(getattr(layer, "bias", None) is None for layer in there):
            lost.append(f"{module}.bias")
    if lost:
        folder = loading.config.format.folder if loading.config.format else None
        raise LoadError(
            f"the model has no place for {len(lost)} bias tensors of the checkpoint: {listing(lost)}",
            where=folder.path if folder else None,
            expected="modules with a bias; leaving these tensors out would change every result",
            todo="biases of norms and of layers that the architecture has without come from msModelSlim's anti-outlier "
            "methods m1, m2 and m4, which are not served yet: quantise with another method",
        )


def _parameters_with_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names: a loader reports it under any of them."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), ([], param))[0].append(name)
    return list(found.values())


def check_reloaded(model: nn.Module) -> None:
    """At the end of a reload, before vLLM puts the old weights back where nothing came.

    Raises:
        LoadError: lists what the reload left out.

    """
    loading = _loadings[model]
    if loading.names is None:
        return
    absent = sorted(min(names) for names in loading.expected if loading.names.isdisjoint(names))
    for path, module in model.named_modules():
        if isinstance(module, LinearBase) and compat.incomplete_at_reload(module):
            absent += [path] if not any(name.startswith(f"{path}.") for name in absent) else []
    loading.names = None
    if absent:
        raise LoadError(
            f"the reload left out {len(absent)} parameters: {listing(absent)}",
            todo="send all tensors of the checkpoint; the engine's weights are incomplete until a complete reload",
        )


def _exempt(module: nn.Module, param: nn.Parameter) -> bool:
    """Parameters that no checkpoint needs to hold: cache scales with defaults, and empty placeholders."""
    return param.numel() == 0 or isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)


def _layers_hint(config: AscendQuantizationConfig) -> str | None:
    """How many layers config.json asks for and how many the files hold, if the names tell."""
    if config.format is None:
        return None
    section = config.format.folder.config
    asked = (section.get("text_config") or section).get("num_hidden_layers")
    numbers = {
        int(part) for name in config.format.folder.modules for part in name.split(".") if part.isdigit()
    }
    if not isinstance(asked, int) or not numbers:
        return None
    return f"config.json asks for {asked} layers, the highest layer number in the files is {max(numbers)}"
