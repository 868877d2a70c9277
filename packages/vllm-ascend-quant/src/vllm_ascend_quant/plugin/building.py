"""Building a model of ours: who answers while vLLM builds it, and what is decided once it exists."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from vllm_ascend_quant import ascend_platform, compat, installed
from vllm_ascend_quant.config import AscendQuantizationConfig, while_building
from vllm_ascend_quant.files import loaders
from vllm_ascend_quant.plugin import wrappers


def build(original: Callable[..., nn.Module], vllm_config: Any, *, prefix: str = "", **kwargs: Any) -> nn.Module:
    """Let vLLM build a model; one of ours is then decided layer by layer, and watched while it is loaded.

    Raises:
        QuantError: if the model does not fit the checkpoint, or a layer cannot be decided or served.

    """
    model_config = kwargs.get("model_config") or vllm_config.model_config
    load_config = vllm_config.load_config
    draft = model_config is not vllm_config.model_config
    if draft:
        load_config = draft_load_config(vllm_config)
        vllm_config = with_own_config(vllm_config, model_config, load_config)
    config = vllm_config.quant_config
    if not isinstance(config, AscendQuantizationConfig):
        with while_building(None):
            return original(vllm_config, prefix=prefix, **kwargs)
    # Here, because vLLM builds every model through this function.
    from vllm_ascend_quant.loading.explaining import explained
    from vllm_ascend_quant.loading.floats import MarkedMemory
    from vllm_ascend_quant.loading.stream import watch_loading
    from vllm_ascend_quant.methods.biases import add_linear_biases
    from vllm_ascend_quant.methods.linear import AscendLinearMethod
    from vllm_ascend_quant.methods.norms import add_norm_biases
    from vllm_ascend_quant.methods.parameter import dtype_of_the_model
    from vllm_ascend_quant.placement.deciding import decide_layers
    from vllm_ascend_quant.placement.deciding_caches import decide_caches
    from vllm_ascend_quant.placement.reading import refuse_what_is_read
    from vllm_ascend_quant.served_model import ServedModel

    wrappers.install(wrappers.FOR_OURS)
    assert config.format is not None, "vLLM calls maybe_update_config first"
    made_up = loaders.made_up(load_config.load_format)
    with MarkedMemory():
        with (
            while_building(config, prefix, made_up),
            explained(config.format),
            dtype_of_the_model(model_config.dtype),
        ):
            model = original(vllm_config, prefix=prefix, **kwargs)
        served = ServedModel.of(model, config.format, model_config, made_up, draft)
        remade = decide_layers(model, served, config, prefix)
        remade |= decide_caches(model, served, vllm_config)
        for layer in compat.layers_read_back(model):
            if isinstance(layer.quant_method, AscendLinearMethod):
                ascend_platform.refuse_absorbed(layer.quant_method.name, str(layer.quant_method.quant.quant_type))
                layer.quant_method.read_back = True
        refuse_what_is_read(model)
        biased = [add_norm_biases(model, served), add_linear_biases(model, served)]
    if remade or any(biased):
        compat.record_for_reload(model)
    watch_loading(model, served)
    return model


def with_own_config(vllm_config: Any, model_config: Any, load_config: Any) -> Any:
    """The config under which a speculative draft is to be built, if it or its target is one of ours.

    vLLM builds drafts that share weights or hidden states with their target (EAGLE, MTP) under the target's
    `VllmConfig`, quantisation included. A draft is quantised as its own folder says, which may be not at all.
    """
    if model_config.quantization not in installed.methods() and not isinstance(
        vllm_config.quant_config, AscendQuantizationConfig
    ):
        return vllm_config
    # Not vLLM's `replace`: where no quantisation is given, that takes the target's again.
    own = copy.copy(vllm_config)
    own.quant_config = VllmConfig.get_quantization_config(model_config, load_config)
    return own


def draft_load_config(vllm_config: Any) -> Any:
    """How a draft that is built under its target's config gets its weights."""
    own = getattr(vllm_config.speculative_config, "draft_load_config", None)
    return own or vllm_config.load_config
