"""Wrappers around what vLLM does with a model that it has built: one of ours is looked at, others pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.files import saved_state
from vllm_ascend_quant.loading.checking import check_loaded, check_reloaded
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.served_model import served_model


def loaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """See that everything was loaded."""
    served = served_model(model)
    if served is None:
        return original(model, *args, **kwargs)
    check_loaded(model, served)
    original(model, *args, **kwargs)
    served.loading.processed = True
    return served.log_report()


def reloaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """See that a reload left nothing out."""
    served = served_model(model)
    if served is not None:
        check_reloaded(model, served)
    return original(model, *args, **kwargs)


def call_workers(original: Callable[..., Any], engine: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """After a reload, forget the prefixes in a quantised cache: their codes belong to the scales before."""
    answers = original(engine, method, *args, **kwargs)
    config = engine.vllm_config.quant_config
    ours = config.format if isinstance(config, AscendQuantizationConfig) else None
    if method == "reload_weights" and ours is not None and ours.caches:
        engine.reset_prefix_cache(reset_running_requests=True)
    return answers


def latent(original: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Give the input of a quantised layer inside latent attention (MLA) the model's dtype."""
    base = getattr(layer, "base_layer", layer)  # of an adapter (LoRA)
    if isinstance(getattr(base, "quant_method", None), AscendLinearMethod):
        return base.params_dtype
    return original(layer, *args, **kwargs)


def absorbed(original: Callable[..., Any], layer: nn.Module, out_dtype: Any = torch.float32) -> Any:
    """Give latent attention the float weight of a quantised layer."""
    method = getattr(getattr(layer, "base_layer", layer), "quant_method", None)
    weight = method.read_weight(out_dtype) if isinstance(method, AscendLinearMethod) else None
    return original(layer, out_dtype) if weight is None else weight


def saved(original: Callable[..., None], model: nn.Module, path: str, *args: Any, **kwargs: Any) -> None:
    """Save what is needed to load a saved state again."""
    served = served_model(model)
    save = functools.partial(original, model, path, *args, **kwargs)
    return save() if served is None else saved_state.save(save, served.format.folder, model, path)


def restored(original: Callable[..., None], loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Bring layers into the form in which a saved state fits."""
    load = functools.partial(original, loader, model, *args, **kwargs)
    return load() if served_model(model) is None else saved_state.load(load, loader, model)
