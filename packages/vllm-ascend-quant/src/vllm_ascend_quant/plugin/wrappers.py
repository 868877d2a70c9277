"""The places where vLLM offers no hook and a function of it is wrapped.

Each wrapper does one thing, passes everything else through, and can be switched off by naming it in the environment
variable VLLM_ASCEND_QUANT_DISABLE (names separated by commas). Each is needed for every vLLM that compat.py supports,
0.23 to 0.32, but for `latent`, which is needed since 0.28:

    configured
             say what is wrong with a name of a model, if --quantization is one of ours (create_engine_config)
    detect   recognise a model without --quantization; contradict a wrong one (EngineArgs.create_model_config)
    draft    the same for a speculative draft, which is also checked here, alone and against a rotation of its target
             (EngineArgs.create_speculative_config)
    download fetch a model of ours where vLLM would, before it is checked (get_quant_config)
    built    decide by module paths once the model exists; build a draft by its own folder (initialize_model)
    loaded   see that everything was loaded (process_weights_after_loading)
    reloaded see that a reload left nothing out (finalize_layerwise_processing)
    emptied  forget prefixes in a quantised cache after a reload (EngineCore.collective_rpc)
    latent   latent attention (MLA) asks a quantised kv_b_proj for the dtype of its input (_get_kv_b_proj_input_dtype)
    absorbed and for its float weight (get_and_maybe_dequant_weights, where it was imported)
    read     the same (get_and_maybe_dequant_weights, for whoever imports it later)
    started, noted, remote, waited
             an error of ours in a worker is raised in the front process (CoreEngineProcManager.__init__,
             BaseModelLoader.load_model, Executor.__init__ for one on another node, wait_for_engine_startup)
    saved    save what is needed to load a saved state again (ShardedStateLoader.save_model)
    restored bring layers into the form in which a saved state fits (ShardedStateLoader.load_weights)

(The names `precedence` and `zeros` switch off what precedence.py and loading/contents.py do.)

Every process that runs vLLM installs them, so this imports nothing: neither the modules of vLLM, which are wrapped
when somebody imports them, nor the wrappers, which are imported when one of them is called.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from vllm_ascend_quant import compat
from vllm_ascend_quant.switches import enabled

logger = logging.getLogger("vllm.ascend_quant")

_MARK = "_vllm_ascend_quant_wrapper"


class Wrapped(NamedTuple):
    """A function of vLLM (`module:name`), and by which of ours (`module:name`, inside this package) it is wrapped."""

    function: str
    wrapper: str


#: Installed in every process: they see a model before it is known to be ours.
ALWAYS = {
    "configured": Wrapped(compat.CREATE_ENGINE_CONFIG, "front:configured"),
    "detect": Wrapped(compat.CREATE_MODEL_CONFIG, "front:detect"),
    "draft": Wrapped(compat.CREATE_DRAFT_CONFIG, "front:draft"),
    "download": Wrapped(compat.GET_QUANT_CONFIG, "front:download"),
    "built": Wrapped(compat.INITIALIZE_MODEL, "building:build"),
    "emptied": Wrapped(compat.CALL_WORKERS, "serving:call_workers"),
    "started": Wrapped(compat.START_ENGINES, "failures:start_engines"),
    "noted": Wrapped(compat.LOAD_MODEL, "failures:load_model"),
    "remote": Wrapped(compat.START_WORKERS, "remote:start_workers"),
    "waited": Wrapped(compat.WAIT_FOR_ENGINES, "failures:wait_for_engines"),
}

#: Installed once a model of ours is built.
FOR_OURS = {
    "loaded": Wrapped(compat.PROCESS_WEIGHTS, "serving:loaded"),
    "reloaded": Wrapped(compat.FINALIZE_RELOAD, "serving:reloaded"),
    "latent": Wrapped(compat.LATENT_INPUT, "serving:latent"),
    "absorbed": Wrapped(compat.LATENT_WEIGHT, "serving:absorbed"),
    "read": Wrapped(compat.READ_WEIGHT, "serving:absorbed"),
    "saved": Wrapped(compat.SAVE_STATE, "serving:saved"),
    "restored": Wrapped(compat.LOAD_STATE, "serving:restored"),
}


def install(wrappers: Mapping[str, Wrapped]) -> None:
    """Wrap each function once, now or when its module is imported; calling again changes nothing."""
    for name, wrapped in wrappers.items():
        if enabled(name):
            module = wrapped.function.partition(":")[0]
            wrapt.register_post_import_hook(functools.partial(_wrap, name, wrapped), module)


def _wrap(name: str, wrapped: Wrapped, _: ModuleType) -> None:
    try:
        owner, attribute = compat.module_level(wrapped.function)
        original = getattr(owner, attribute)
    except AttributeError as error:  # must not stop the models of others
        if wrapped.function in compat.NOT_IN_ALL:
            return
        compat.missing.append(wrapped.function)
        logger.warning("%s: models of our formats will be refused, all others are left to vLLM", error)
        return
    if getattr(original, _MARK, None) == name:
        return
    function = _function(original, wrapped.wrapper, name)
    static = isinstance(inspect.getattr_static(owner, attribute), staticmethod)
    setattr(owner, attribute, staticmethod(function) if static else function)


def _function(original: Callable[..., Any], wrapper: str, name: str) -> Callable[..., Any]:
    """A plain function, since a partial would not become a method."""
    module, _, attribute = wrapper.partition(":")

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        ours = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
        return ours(original, *args, **kwargs)

    setattr(function, _MARK, name)
    return function
