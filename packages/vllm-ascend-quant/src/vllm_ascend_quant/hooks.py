"""The places where vLLM offers no hook and a function of it is wrapped.

Each wrapper does one thing, passes everything else through, and can be switched off by naming it in the environment
variable VLLM_ASCEND_QUANT_DISABLE (names separated by commas). All are needed for every vLLM that compat.py supports:

    named    say what is wrong with a name of a model, if --quantization is one of ours (create_engine_config)
    detect   recognise a model without --quantization; contradict a wrong one (EngineArgs.create_model_config)
    download fetch a model of ours where vLLM would, before it is checked (get_quant_config)
    built    decide by module paths once the model exists (initialize_model)
    loaded   see that everything was loaded (process_weights_after_loading)
    reloaded see that a reload left nothing out (finalize_layerwise_processing)
    saved    save what is needed to load a saved state again (ShardedStateLoader.save_model)
    restored bring layers into the form in which a saved state fits (ShardedStateLoader.load_weights)

(The name `precedence` switches off what precedence.py does.)
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from quant_core import list_formats
from vllm_ascend_quant import compat, detection, hub, load_formats, saved_state
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.explaining import building
from vllm_ascend_quant.loading import check_loaded, check_reloaded, config_of, watch_loading
from vllm_ascend_quant.norms import add_norm_biases
from vllm_ascend_quant.settling import settle_layers

DISABLE = "VLLM_ASCEND_QUANT_DISABLE"
_MARK = "_vllm_ascend_quant_hook"


def enabled(name: str) -> bool:
    """Whether the user has not switched off this change of vLLM."""
    return name not in {part.strip() for part in os.environ.get(DISABLE, "").split(",")}


def install() -> None:
    """Wrap each function once; calling again changes nothing."""
    for name, (path, wrapper) in _HOOKS.items():
        owner, attribute = compat.module_level(path)
        original = getattr(owner, attribute)
        if enabled(name) and getattr(original, _MARK, None) != name:
            function = _wrapped(original, wrapper, name)
            static = isinstance(inspect.getattr_static(owner, attribute), staticmethod)
            setattr(owner, attribute, staticmethod(function) if static else function)


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A plain function, since a partial would not become a method."""

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(function, _MARK, name)
    return function


def _detect(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    detection.choose_method(engine_args)
    ours = {quant_format.vllm_name for quant_format in list_formats().values()}
    load_formats.check(engine_args.load_format, engine_args.quantization in ours, engine_args.model)
    return original(engine_args, *args, **kwargs)


def _named(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(engine_args, *args, **kwargs)
    except OSError as error:
        ours = {quant_format.vllm_name for quant_format in list_formats().values()}
        if engine_args.quantization not in ours or os.path.exists(engine_args.model):
            raise
        raise hub.unknown(engine_args.model, engine_args.revision, error) from error


def _download(original: Callable[..., Any], model_config: Any, load_config: Any) -> Any:
    config = original(model_config, load_config)
    if isinstance(config, AscendQuantizationConfig):
        config.source = functools.partial(load_formats.open_folder, model_config, load_config)
    return config


def _built(original: Callable[..., nn.Module], vllm_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
    config = vllm_config.quant_config
    with building(config):
        model = original(vllm_config, *args, **kwargs)
    if isinstance(config, AscendQuantizationConfig):
        config.dummy = not load_formats.values_are_read(vllm_config.load_config.load_format)
        settlement = settle_layers(model, config)
        biased = add_norm_biases(model, config, settlement.paths)
        if settlement.remade or biased:
            compat.record_for_reload(model)
        watch_loading(model, config, settlement.paths, vllm_config.model_config)
    return model


def _loaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    config = config_of(model)
    if config is not None:
        check_loaded(model)
    original(model, *args, **kwargs)
    if config is not None:
        config.log_report()


def _reloaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    if config_of(model) is None:
        return original(model, *args, **kwargs)
    check_reloaded(model)
    return original(model, *args, **kwargs)


def _saved(original: Callable[..., None], model: nn.Module, path: str, *args: Any, **kwargs: Any) -> None:
    config = config_of(model)
    save = functools.partial(original, model, path, *args, **kwargs)
    if config is None:
        save()
    else:
        saved_state.save(save, config, model, path)


def _restored(original: Callable[..., None], loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    load = functools.partial(original, loader, model, *args, **kwargs)
    if config_of(model) is None:
        load()
    else:
        saved_state.load(load, loader, model)


_HOOKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "named": (compat.CREATE_ENGINE_CONFIG, _named),
    "detect": (compat.CREATE_MODEL_CONFIG, _detect),
    "download": (compat.GET_QUANT_CONFIG, _download),
    "built": (compat.INITIALIZE_MODEL, _built),
    "loaded": (compat.PROCESS_WEIGHTS, _loaded),
    "reloaded": (compat.FINALIZE_RELOAD, _reloaded),
    "saved": (compat.SAVE_STATE, _saved),
    "restored": (compat.LOAD_STATE, _restored),
}
