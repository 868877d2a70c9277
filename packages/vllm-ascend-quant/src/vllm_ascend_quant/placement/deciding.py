"""Deciding every layer by its path in the built model.

While a model is being built, vLLM names each layer by a prefix that is only a hint: for some architectures it is empty
or differs from the module's path, and the mapping of fused modules may be completed later. What counts is where the
loader will put a tensor (paths.py), so layers that were decided otherwise are made again.
"""

from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import (
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LimitError,
    StoredForm,
    UnknownLayerError,
    raise_findings,
)
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.methods.choice import method_for
from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod
from vllm_ascend_quant.methods.linear import AscendLinearMethod, layer_class
from vllm_ascend_quant.methods.parameter import AscendParameter
from vllm_ascend_quant.placement.experts import (
    ExpertModules,
    expert_modules,
    is_expert_layer,
    numbered_children,
    told_modules,
)
from vllm_ascend_quant.placement.paths import without_prefix
from vllm_ascend_quant.placement.probing import ask_loader, ask_loader_for_experts
from vllm_ascend_quant.served_model import ServedModel

logger = init_logger("vllm.ascend_quant")


def decide_layers(model: nn.Module, served: ServedModel, config: AscendQuantizationConfig, prefix: str = "") -> bool:
    """Decide each layer of a built model by its path; make those again that were decided otherwise.

    Args:
        model: as vLLM built it.
        served: its owner, which gets the decisions.
        config: answered while the model was built, so it has what vLLM handed over about names.
        prefix: put before the model's names while it was built, as vLLM does for draft models.

    Returns:
        whether any layer was made again.

    Raises:
        QuantError: if a layer cannot be decided or served, or quantised weights would belong to no layer.

    """
    unknown: dict[str, LinearBase] = {}
    unknown_experts: dict[str, nn.Module] = {}
    remade = False
    numbered = numbered_children(served.paths.stored_at)
    for layer, places in _modules_with_paths(model):
        if isinstance(layer, LinearBase):
            path, quant = _decide(layer, places, served, config, prefix)
            if quant is None:
                unknown[path] = layer
                continue
            remade |= _apply_decision(path, layer, quant, served)
        elif isinstance(layer, VocabParallelEmbedding):
            remade |= _decide_vocabulary(layer, places, served)
        elif is_expert_layer(layer):
            found = next(filter(None, (expert_modules(layer, p, numbered, served.format) for p in places)), None)
            if found is None:
                unknown_experts[places[0]] = layer
            else:
                remade |= _apply_to_experts(places[0], layer, *found, served)
    if unknown or unknown_experts:
        left = _left_over(served)
        remade |= _decide_experts_left_over(model, unknown_experts, served, left)
        remade |= _decide_left_over(model, unknown, served, left) if unknown else False
    _report(served)
    for layer, _ in _modules_with_paths(model):
        method = getattr(layer, "quant_method", None)
        if isinstance(method, (AscendFusedMoEMethod, AscendLinearMethod)):
            method.made_up = served.made_up
    return remade


def _report(served: ServedModel) -> None:
    """Tell the format what was decided, and say what it finds odd about that."""
    findings = list(served.format.review(served.layers))
    for finding in findings:
        if finding.severity == "warning":
            logger.warning("%s", finding)
    raise_findings(findings)


def _apply_to_experts(path: str, layer: Any, experts: ExpertModules, quant: LayerQuant, served: ServedModel) -> bool:
    """Take note of a decision about experts; whether the layer had to be made again for it."""
    served.layers[path] = quant
    method = layer.quant_method
    if isinstance(method, AscendFusedMoEMethod):
        method.name = path
        if (method.experts, method.quant.quant_type) == (experts, quant.quant_type):
            return False
    elif quant.quant_type is None:
        return False
    _make_experts_again(layer, path, served, experts, quant)
    return True


def _make_experts_again(layer: Any, path: str, served: ServedModel, experts: ExpertModules, quant: LayerQuant) -> None:
    for name in list(layer._parameters):
        delattr(layer, name)
    config = layer.moe_config
    method = compat.unquantised_experts(config)
    if quant.quant_type is not None:
        method = AscendFusedMoEMethod(layer, served.format, path, experts, quant)
    compat.replace_expert_method(layer, method)
    method.create_weights(
        layer,
        num_experts=config.num_local_experts,
        hidden_size=layer.hidden_size,
        intermediate_size_per_partition=config.intermediate_size_per_partition,
        params_dtype=layer.params_dtype,
        weight_loader=layer.weight_loader,
        global_num_experts=config.num_experts,
    )


def _modules_with_paths(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module once, with all its paths: models register one under several names, the loader uses any of them."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def _decide(
    layer: LinearBase, places: list[str], served: ServedModel, config: AscendQuantizationConfig, prefix: str
) -> tuple[str, LayerQuant | None]:
    """The path under which the loader fills a layer, and the format's answer; None if the checkpoint lacks it."""
    found = ((place, *served.paths.members(place, config.packed_modules_mapping)) for place in places)
    path, modules, absent = next((answer for answer in found if answer[1]), (places[0], (), ()))
    try:
        modules = modules or _modules_by_hint(without_prefix(layer.prefix, prefix), config)
        quant = served.resolve(path, modules, layer_class(layer))
    except UnknownLayerError:
        quant = None
    if quant is not None and quant.quant_type is not None and absent:
        raise LayerResolutionError(
            f"{path}: the checkpoint has only some members of this fused layer, which are {quant.quant_type}",
            found=listing(modules),
            expected=f"also {listing(absent)}",
            todo="the checkpoint is incomplete or belongs to another architecture",
        )
    return path, quant


def _decide_vocabulary(layer: VocabParallelEmbedding, places: list[str], served: ServedModel) -> bool:
    """Whether a head or an embedding was made again. Those that the checkpoint lacks are float, or tied."""
    remade = False
    _check_own_weight(layer, places[0])
    for path in places:
        modules = served.paths.stored_at.get(path, ())
        try:
            quant = served.resolve(path, modules, layer_class(layer)) if modules else None
        except UnknownLayerError:
            quant = None
        if quant is None:
            continue  # not described, or tied
        if quant.quant_type is not None and len(places) > 1:
            raise _tied(path, places)
        remade |= _apply_decision(path, layer, quant, served)
    return remade


def _check_own_weight(layer: VocabParallelEmbedding, path: str) -> None:
    """Refuse a head that was given the weight of an embedding, if either is quantised.

    vLLM ties them where the files hold one of them; an older vLLM where they hold both.
    """
    method = layer.quant_method
    name = method.name if isinstance(method, AscendLinearMethod) else None
    own = {param for param_name, param in layer.named_parameters(recurse=False) if param_name != "bias"}
    owners = {param.filling.owner if isinstance(param, AscendParameter) else None for param in own}
    if owners - {name}:
        raise _tied(path, [path, "an embedding"])


def _tied(path: str, layers: list[str]) -> LimitError:
    return LimitError(
        f"{path}: the model ties it to another layer, and their weight is quantised",
        found=f"one weight for {listing(layers)}",
        expected="a float weight, or one of its own for each",
        todo="leave the embedding in float, or save the head beside it and set tie_word_embeddings to false",
    )


def _modules_by_hint(name: str, config: AscendQuantizationConfig) -> tuple[str, ...]:
    """For loaders that rename by code of their own: to most likely the name that vLLM gave while building."""
    try:
        modules = config.find(name)
    except LayerResolutionError:
        modules = ()
    if not modules:
        raise UnknownLayerError(f"{name}: no module of the checkpoint has this name")
    return modules


def _apply_decision(
    path: str, layer: LinearBase | VocabParallelEmbedding, quant: LayerQuant, served: ServedModel
) -> bool:
    """Take note of a decision; whether the layer had to be made again for it."""
    served.layers[path] = quant
    method = layer.quant_method
    if isinstance(method, AscendLinearMethod):
        method.name = path
        if (method.quant.quant_type, method.quant.modules) == (quant.quant_type, quant.modules):
            return False
    elif quant.quant_type is None:
        return False
    name = compat.build_name(layer)
    logger.info("%s: decided by its path in the model, vLLM had named it %r while building", path, name)
    for name in list(layer._parameters):
        if name != "bias":
            delattr(layer, name)
    layer.quant_method = method_for(layer, path, served.format, quant)
    layer.quant_method.create_weights(
        layer,
        *compat.weight_sizes(layer),
        layer.params_dtype,
        weight_loader=getattr(layer, "weight_loader_v2", layer.weight_loader),
    )
    layer.update_param_tp_status()  # type: ignore[no-untyped-call]
    return True


def _left_over(served: ServedModel) -> list[StoredForm]:
    """The quantised modules that belong to no layer."""
    claimed = {module for quant in served.layers.values() for module in quant.modules}
    return [
        form
        for module, form in served.modules.items()
        if module not in claimed and form.has("weight") and served.resolve(module, (module,)).quant_type is not None
    ]


def _decide_experts_left_over(
    model: nn.Module, unknown: dict[str, nn.Module], served: ServedModel, left: list[StoredForm]
) -> bool:
    """Experts under names that nothing explains, as those of a layer for multi-token prediction: the loader tells.

    Raises:
        LayerResolutionError: if the loader puts quantised weights into some experts of a layer only.

    """
    remade = False
    asked = ask_loader_for_experts(model, unknown, left) if unknown and left else {}
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
        quant = served.format.experts_quant(LayerQuery(path, "moe", experts=experts))
        remade |= _apply_to_experts(path, layer, experts, quant, served)
        claimed = set(told.values())
        left[:] = [form for form in left if form.module not in claimed]
    return remade


def _decide_left_over(
    model: nn.Module, unknown: dict[str, LinearBase], served: ServedModel, left: list[StoredForm]
) -> bool:
    """Layers without weights are the model's affair, unless its loader puts quantised weights there, or fails to."""
    answer = ask_loader(model, unknown, left)
    remade = False
    for path, modules in answer.stored_at.items():
        remade |= _apply_decision(path, unknown.pop(path), served.resolve(path, modules), served)
    if answer.refused and unknown:
        module, complaint = next(iter(answer.refused.items()))
        raise LayerResolutionError(
            f"{len(unknown)} linear layers of the model have no weights in the checkpoint: {listing(unknown)}",
            found=f"quantised modules that belong to no layer: {listing(answer.refused)}",
            where=f"{served.format.folder.path}; the model's loader says of {module}: {complaint}",
            todo="check that config.json describes the model that was quantised; if it does, report the architecture",
        )
    return remade
