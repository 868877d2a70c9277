"""Deciding the experts of each layer by its path in the built model, as deciding.py does with other layers."""

from typing import Any

from torch import nn

from quant_core import LayerQuant, LayerQuery, LayerResolutionError
from quant_core.errors import listing
from vllm_ascend_quant import ascend_platform, compat
from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod
from vllm_ascend_quant.placement.experts import (
    ExpertModules,
    expert_modules,
    is_expert_layer,
    numbered_children,
    told_modules,
)
from vllm_ascend_quant.placement.paths import modules_with_paths
from vllm_ascend_quant.placement.probing import ask_loader_for_experts
from vllm_ascend_quant.served_model import ServedModel


def decide_experts(model: nn.Module, served: ServedModel) -> bool:
    """Decide the experts of each layer; make those again that were decided otherwise while the model was built.

    Returns:
        whether any were made again.

    Raises:
        QuantError: if experts cannot be decided or served.

    """
    unknown: dict[str, nn.Module] = {}
    numbered = numbered_children(served.paths.stored_at)
    remade = False
    for layer, places in modules_with_paths(model):
        if is_expert_layer(layer):
            found = next(filter(None, (expert_modules(layer, p, numbered, served.format) for p in places)), None)
            if found is None:
                unknown[places[0]] = layer
            else:
                remade |= _apply(places[0], layer, found, served)
    return _decide_left_over(model, unknown, served) or remade


def _apply(path: str, layer: Any, experts: ExpertModules, served: ServedModel) -> bool:
    """Decide about experts, if nobody has about the same modules; whether the layer had to be made again for it."""
    method = layer.quant_method
    ours = isinstance(method, AscendFusedMoEMethod)
    if ours and method.experts == experts:
        method.name, served.layers[path] = path, method.quant
        return False
    quant = served.format.experts_quant(LayerQuery(path, "moe", experts=experts))
    served.layers[path] = quant
    if quant.quant_type is None and not ours:
        return False
    _make_experts_again(layer, path, served, experts, quant)
    return True


def _make_experts_again(layer: Any, path: str, served: ServedModel, experts: ExpertModules, quant: LayerQuant) -> None:
    for name in list(layer._parameters):
        delattr(layer, name)
    config, tid2eid = layer.moe_config, getattr(layer, "tid2eid", None)
    if quant.quant_type is None:
        method = ascend_platform.unquantised_experts(layer, tid2eid)
    else:
        method_class = ascend_platform.expert_method_class()
        method = method_class(layer, served.format, path, experts, quant, served.made_up)
        method = ascend_platform.for_experts(method, layer, tid2eid)
    compat.replace_expert_method(layer, method)
    method.create_weights(
        layer,
        num_experts=config.num_local_experts,
        hidden_size=layer.hidden_size,
        intermediate_size_per_partition=config.intermediate_size_per_partition,
        params_dtype=layer.params_dtype,
        weight_loader=compat.expert_loader(layer),
        global_num_experts=config.num_experts,
    )


def _decide_left_over(model: nn.Module, unknown: dict[str, nn.Module], served: ServedModel) -> bool:
    """Experts under names that nothing explains, as those of a layer for multi-token prediction: the loader tells.

    Raises:
        LayerResolutionError: if the loader puts quantised weights into some experts of a layer only, or knows no
            better.

    """
    remade = False
    left = served.left_over() if unknown else []
    asked = ask_loader_for_experts(model, unknown, left) if left else {}
    for path, told in asked.items():
        layer: Any = unknown[path]
        experts = told_modules(told, layer.moe_config.num_logical_experts)
        if experts is None:
            raise LayerResolutionError(
                f"{path}: the checkpoint has only some of these experts, and they are quantised",
                found=listing(told.values()),
                expected=f"the projections of {layer.moe_config.num_logical_experts} experts",
                where=str(served.format.folder.path),
                todo="check that config.json describes the model that was quantised, and that no file is missing",
            )
        remade |= _apply(path, layer, experts, served)
    _refuse_nameless(unknown, served)
    return remade


def _refuse_nameless(unknown: dict[str, nn.Module], served: ServedModel) -> None:
    """Refuse quantised modules below experts that nobody knows: vLLM might copy the codes of one into float memory."""
    nameless = {path: layer for path, layer in unknown.items() if path not in served.layers}
    below = served.paths.below([compat.expert_prefix(layer, path) for path, layer in nameless.items()])
    left = {form.module for form in served.left_over()} if any(below.values()) else set()
    for prefix, modules in below.items():
        if strange := sorted(left.intersection(modules)):
            raise LayerResolutionError(
                f"{prefix}: the checkpoint has quantised modules below these experts, and none is a projection of one",
                found=listing(strange),
                expected=f"{prefix}.<number>.<projection>, by the names of the model",
                where=str(served.format.folder.path),
                todo="check that config.json describes the model that was quantised; otherwise report the architecture",
            )
