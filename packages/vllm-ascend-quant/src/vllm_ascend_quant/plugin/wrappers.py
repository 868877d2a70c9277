"""The places where vLLM offers no hook and a function of it is wrapped.

Each wrapper does one thing, passes everything else through, and can be switched off by naming it in the environment
variable VLLM_ASCEND_QUANT_DISABLE (names separated by commas). All are needed for every vLLM that compat.py supports:

    named    say what is wrong with a name of a model, if --quantization is one of ours (create_engine_config)
    detect   recognise a model without --quantization; contradict a wrong one (EngineArgs.create_model_config)
    draft    the same for a speculative draft, which is also checked here (EngineArgs.create_speculative_config)
    download fetch a model of ours where vLLM would, before it is checked (get_quant_config)
    built    decide by module paths once the model exists; build a draft by its own folder (initialize_model)
    loaded   see that everything was loaded (process_weights_after_loading)
    reloaded see that a reload left nothing out (finalize_layerwise_processing)
    saved    save what is needed to load a saved state again (ShardedStateLoader.save_model)
    restored bring layers into the form in which a saved state fits (ShardedStateLoader.load_weights)

(The names `precedence` and `zeros` switch off what precedence.py and loading/contents.py do.)
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from quant_core import list_formats
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.files import detection, hub, loaders, saved_state
from vllm_ascend_quant.loading.checking import check_loaded, check_reloaded
from vllm_ascend_quant.plugin.building import build
from vllm_ascend_quant.served_model import served_model
from vllm_ascend_quant.switches import enabled

_MARK = "_vllm_ascend_quant_wrapper"


def install() -> None:
    """Wrap each function once; calling again changes nothing."""
    for name, (path, wrapper) in WRAPPERS.items():
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


def _ours(method: str | None) -> bool:
    return method in {quant_format.vllm_name for quant_format in list_formats().values()}


def _detect(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    detection.choose_method(engine_args)
    loaders.check(engine_args.load_format, _ours(engine_args.quantization), engine_args.model)
    return original(engine_args, *args, **kwargs)


def _draft(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    detection.choose_draft_method(engine_args)
    settings = original(engine_args, *args, **kwargs)
    draft = getattr(settings, "draft_model_config", None)
    if draft is not None and _ours(draft.quantization) and draft.model != settings.target_model_config.model:
        load_config = settings.draft_load_config or engine_args.create_load_config()
        loaders.check(load_config.load_format, True, draft.model)
        VllmConfig.get_quantization_config(draft, load_config)  # in the front process, where a user sees the error
    return settings


def _named(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(engine_args, *args, **kwargs)
    except OSError as error:
        if not _ours(engine_args.quantization) or os.path.exists(engine_args.model):
            raise
        raise hub.unknown(engine_args.model, engine_args.revision, error) from error


def _download(original: Callable[..., Any], model_config: Any, load_config: Any) -> Any:
    taken = compat.for_quant_config(model_config) if _ours(model_config.quantization) else model_config
    config = original(taken, load_config)
    if isinstance(config, AscendQuantizationConfig):
        config.open_folder = functools.partial(loaders.open_folder, model_config, load_config)
        config.values_are_read = loaders.values_are_read(load_config.load_format)
    return config


def _loaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    served = served_model(model)
    if served is None:
        return original(model, *args, **kwargs)
    check_loaded(model, served)
    original(model, *args, **kwargs)
    served.loading.processed = True
    return served.log_report()


def _reloaded(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    served = served_model(model)
    if served is not None:
        check_reloaded(model, served)
    return original(model, *args, **kwargs)


def _saved(original: Callable[..., None], model: nn.Module, path: str, *args: Any, **kwargs: Any) -> None:
    served = served_model(model)
    save = functools.partial(original, model, path, *args, **kwargs)
    return save() if served is None else saved_state.save(save, served.format.folder, model, path)


def _restored(original: Callable[..., None], loader: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    load = functools.partial(original, loader, model, *args, **kwargs)
    return load() if served_model(model) is None else saved_state.load(load, loader, model)


#: Name to the function that is wrapped and its wrapper.
WRAPPERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "named": (compat.CREATE_ENGINE_CONFIG, _named),
    "detect": (compat.CREATE_MODEL_CONFIG, _detect),
    "draft": (compat.CREATE_DRAFT_CONFIG, _draft),
    "download": (compat.GET_QUANT_CONFIG, _download),
    "built": (compat.INITIALIZE_MODEL, build),
    "loaded": (compat.PROCESS_WEIGHTS, _loaded),
    "reloaded": (compat.FINALIZE_RELOAD, _reloaded),
    "saved": (compat.SAVE_STATE, _saved),
    "restored": (compat.LOAD_STATE, _restored),
}
