"""Wrappers around vLLM's arguments and configuration, in the process in which a user starts it.

They look at every model that is started, so nothing is imported here that is heavier than an installed format.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from quant_core import LimitError, QuantFormat
from vllm_ascend_quant import compat, installed
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.files import detection, hub, loaders
from vllm_ascend_quant.plugin.drafting import refuse_rotated_target


def _ours(method: str | None) -> bool:
    return method in installed.methods()


def detect(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Recognise a model without --quantization; contradict a wrong one."""
    detection.choose_method(engine_args)
    loaders.check(engine_args.load_format, _ours(engine_args.quantization), engine_args.model)
    return original(engine_args, *args, **kwargs)


def draft(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for a speculative draft, which is also checked here, alone and against a rotation of its target."""
    detection.choose_draft_method(engine_args)
    settings = original(engine_args, *args, **kwargs)
    if settings is None:
        return None
    model_config = settings.draft_model_config
    apart = model_config is not None and model_config.model != settings.target_model_config.model
    if apart and _ours(model_config.quantization):
        load_config = settings.draft_load_config or engine_args.create_load_config()
        loaders.check(load_config.load_format, True, model_config.model)
        VllmConfig.get_quantization_config(model_config, load_config)  # here, where a user sees the error
    refuse_rotated_target(settings, engine_args.create_load_config(), engine_args.additional_config)
    return settings


def configured(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Say what is wrong with the name of a model that is to be in one of our formats, or with the cache asked for."""
    given = engine_args.kv_cache_dtype  # the user's own word: vLLM puts the checkpoint's in the place of "auto"
    try:
        config = original(engine_args, *args, **kwargs)
    except OSError as error:
        if not _ours(engine_args.quantization) or os.path.exists(engine_args.model):
            raise
        raise hub.unknown(engine_args.model, engine_args.revision, error) from error
    quant_format = getattr(config.quant_config, "format", None)
    if isinstance(config.quant_config, AscendQuantizationConfig) and quant_format and quant_format.caches:
        _agree_on_cache(given, config.cache_config, quant_format)
    return config


def _agree_on_cache(given: str, cache_config: Any, quant_format: QuantFormat) -> None:
    """Leave a cache that the checkpoint quantises to its schemes, layer by layer.

    Raises:
        LimitError: if the user asks for another one.

    """
    types = sorted({str(quant.quant_type) for quant in quant_format.caches.values()})
    if given != "auto" and not (given in ("fp8", "fp8_e4m3") and types == ["KV_FP8"]):
        evidence = next(iter(quant_format.caches.values())).evidence[0]
        raise LimitError(
            f"--kv-cache-dtype {given} contradicts the checkpoint, whose cache is {' and '.join(types)}",
            where=str(evidence),
            expected="auto: each layer's cache is as the checkpoint says",
            todo="leave --kv-cache-dtype out",
        )
    cache_config.cache_dtype = "auto"


def download(original: Callable[..., Any], model_config: Any, load_config: Any) -> Any:
    """Have a model of ours fetched where vLLM would fetch it, before it is checked."""
    taken = compat.for_quant_config(model_config) if _ours(model_config.quantization) else model_config
    config = original(taken, load_config)
    if isinstance(config, AscendQuantizationConfig):
        config.open_folder = functools.partial(loaders.open_folder, model_config, load_config)
        config.values_are_read = loaders.values_are_read(load_config.load_format)
    return config
