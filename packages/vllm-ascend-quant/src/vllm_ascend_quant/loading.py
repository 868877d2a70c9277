"""Seeing that everything was loaded, at the first load and at every reload.

vLLM checks this for unquantised models only: a quantised one starts and answers nonsense when a tensor is absent.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from quant_core import LoadError, QuantError
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.explaining import layers_hint, stopped
from vllm_ascend_quant.floats import check_rows, filled_in_parts, linear_layers, mark_unfilled, unfilled
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.naming import ModelPaths
from vllm_ascend_quant.parameter import AscendParameter
from vllm_ascend_quant.sources import check_source


@dataclass
class Loading:
    """What is known about the loading of one model.

    Attributes:
        config: the model's quantisation config.
        source: vLLM's model config, whose `model` is the folder that weights are loaded from.
        held: what `model` was when weights were last loaded without an error.
        called: whether the model's `load_weights` was called since the last check; it is not for made-up weights.
        names: the parameters that it reported; None where a model does not report.
        expected: the parameters that every load must fill, each by all its names.
        biases: the checkpoint modules with a `.bias` tensor, and the modules where it may belong.

    """

    config: AscendQuantizationConfig
    source: Any
    held: str
    called: bool = False
    names: set[str] | None = None
    expected: frozenset[frozenset[str]] = frozenset()
    biases: dict[str, list[str]] = field(default_factory=dict)


_loadings: "weakref.WeakKeyDictionary[nn.Module, Loading]" = weakref.WeakKeyDictionary()


def config_of(model: nn.Module) -> AscendQuantizationConfig | None:
    """The config of a model that `watch_loading` was called for."""
    loading = _loadings.get(model)
    return None if loading is None else loading.config


def watch_loading(model: nn.Module, config: AscendQuantizationConfig, paths: ModelPaths, source: Any) -> None:
    """From now on, take note of what the model's `load_weights` is given and reports.

    Whatever it raises becomes an error that names the tensor.

    Raises:
        LoadError: if float tensors would not fit.

    """
    loading = Loading(config, source, source.model, biases=_bias_places(config, paths))
    _loadings[model] = loading
    original: Any = model.load_weights
    started = source.model
    reference = weakref.ref(model)  # the function becomes an attribute of the model

    @functools.wraps(original)
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        last: list[tuple[str, torch.Tensor]] = []
        loaded_model = reference()
        assert loaded_model is not None, "its own method is running"
        try:
            other = check_source(config, source, started)
            if other is not None:
                check_rows(loaded_model, config, other)
            reported = original(_noting(weights, last), *args, **kwargs)
        except Exception as error:
            failed = source.model
            _give_up(loaded_model)
            if isinstance(error, (QuantError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise stopped(config, failed, last, error) from error
        loading.called = True
        loading.names = None if reported is None else (loading.names or set()) | set(reported)
        return reported

    model.load_weights = load_weights  # type: ignore[assignment]
    if not config.dummy:
        assert config.format is not None
        check_rows(model, config, config.format.folder)
        mark_unfilled(model)


def check_loaded(model: nn.Module) -> None:
    """After the first load, before processing.

    Raises:
        LoadError: lists the parameters that nothing was loaded into, or tensors that the model has no place for.

    """
    loading = _loadings[model]
    config = loading.config
    names, called = loading.names, loading.called
    loading.names, loading.called = None, False
    in_parts = {id(param) for layer in filled_in_parts(model).values() for param in layer.parameters(recurse=False)}
    inside: set[frozenset[str]] = set()
    others: set[frozenset[str]] = set()
    for aliases, param in _parameters_with_names(model):
        if not _exempt(model.get_submodule(aliases[0].rpartition(".")[0]), param):
            (inside if id(param) in in_parts else others).add(frozenset(aliases))
    # These are seen to by what they hold: some models fill more of them than they report.
    loading.expected = frozenset({*others, *(aliases for aliases in inside if not aliases.isdisjoint(names or ()))})
    if not called:
        return
    check_biases(model, loading)
    absent = unfilled(model, config)
    absent += [min(aliases) for aliases in others if names is not None and names.isdisjoint(aliases)]
    if absent:
        raise LoadError(
            f"{len(absent)} of the model's parameters were not loaded: {listing(absent)}",
            where=config.format.folder.path if config.format else None,
            found=layers_hint(config),
            todo="check that config.json describes the model whose weights these are, and that no file is missing",
        )


def check_reloaded(model: nn.Module) -> None:
    """At the end of a reload, before vLLM puts the old weights back where nothing came.

    Raises:
        LoadError: lists what the reload left out. Layers that were left out keep their old weights.

    """
    loading = _loadings[model]
    if not loading.called:
        return
    names = loading.names
    loading.names, loading.called = None, False
    absent = [min(aliases) for aliases in loading.expected if names is not None and names.isdisjoint(aliases)]
    for path, layer in linear_layers(model).items():
        if compat.incomplete_at_reload(layer) and not any(name.rpartition(".")[0] == path for name in absent):
            method = layer.quant_method
            # Of what vLLM loads itself, only the count of elements is known.
            absent += (method.missing(layer) if isinstance(method, AscendLinearMethod) else []) or [f"a part of {path}"]
    if absent:
        _give_up(model)
        raise LoadError(
            f"the reload left out {len(absent)} of the model's parameters: {listing(sorted(absent))}",
            todo="send all tensors of the checkpoint; until then the engine holds a mixture of old and new weights",
        )
    check_biases(model, loading)
    loading.held = loading.source.model


def check_biases(model: nn.Module, loading: Loading) -> None:
    """Refuse `.bias` tensors for which the model has no parameter: vLLM's loaders drop them without a word.

    Asked after loading, because a loader may make the parameter when it meets the tensor.

    Raises:
        LoadError: names the tensors.

    """
    modules = dict(model.named_modules(remove_duplicate=False))
    lost = []
    for module, places in loading.biases.items():
        there = [modules[path] for path in places if path in modules]
        if there and not any(_takes_bias(layer) for layer in there):
            lost.append(f"{module}.bias")
    if lost:
        folder = loading.config.format.folder if loading.config.format else None
        raise LoadError(
            f"the model has no place for {len(lost)} bias tensors of the checkpoint: {listing(lost)}",
            where=folder.path if folder else None,
            expected="modules with a bias; leaving these tensors out would change every result",
            todo="biases of layers that the architecture has without come from msModelSlim's anti-outlier methods m1, "
            "m2 and m4: quantise with another method, or these layers as W8A8, which keeps its bias elsewhere",
        )


def _takes_bias(layer: nn.Module) -> bool:
    """Whether a bias that is stored for a layer has an effect: as its parameter, or inside what else is stored."""
    method = getattr(layer, "quant_method", None)
    folded = isinstance(method, AscendLinearMethod) and method.quant_method.folds_bias
    return folded or getattr(layer, "bias", None) is not None


def _bias_places(config: AscendQuantizationConfig, paths: ModelPaths) -> dict[str, list[str]]:
    assert config.format is not None
    owner = {module: path for path, quant in config.layers.items() for module in quant.modules}
    return {
        module: [owner[module]] if module in owner else paths.paths_of(module)
        for module, form in config.format.folder.modules.items()
        if form.has("bias")
    }


def _noting(
    weights: Iterable[tuple[str, torch.Tensor]], last: list[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream; `last` holds what was handed out last."""
    for name, tensor in weights:
        last[:] = [(name, tensor)]
        yield name, tensor


def _give_up(model: nn.Module) -> None:
    """Leave no half-done reload behind: the next one would count its tensors to this one's, or look into its folder."""
    loading = _loadings[model]
    loading.source.model = loading.held
    for param in model.parameters():
        if isinstance(param, AscendParameter):
            param.filled.clear()
    compat.abandon_reload(model)


def _parameters_with_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names: a loader reports it under any of them."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), ([], param))[0].append(name)
    return list(found.values())


def _exempt(module: nn.Module, param: nn.Parameter) -> bool:
    """Parameters that no checkpoint needs to hold: cache scales with defaults, and empty placeholders."""
    return param.numel() == 0 or isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
