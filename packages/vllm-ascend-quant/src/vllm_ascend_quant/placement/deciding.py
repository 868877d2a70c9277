"""Deciding every layer by its path in the built model.

While a model is being built, vLLM names each layer by a prefix that is only a hint: for some architectures it is empty
or differs from the module's path, and the mapping of fused modules may be completed later. What counts is where the
loader will put a tensor (paths.py), so layers that were decided otherwise are made again.
"""

import logging

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import (
    LayerQuant,
    LayerResolutionError,
    UnknownLayerError,
    raise_findings,
)
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.choice import method_for
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.methods.linear import AscendLinearMethod, layer_class
from vllm_ascend_quant.placement.deciding_experts import decide_experts
from vllm_ascend_quant.placement.paths import modules_with_paths, without_prefix
from vllm_ascend_quant.placement.probing import ask_loader
from vllm_ascend_quant.placement.tying import shared_tables, stored_apart, tie_again
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
    remade = False
    tied = shared_tables(model)
    for layer, places in modules_with_paths(model):
        if isinstance(layer, LinearBase):
            path, quant = _decide(layer, places, served, config, prefix)
            if quant is None:
                unknown[path] = layer
                continue
            remade |= _apply_decision(path, layer, quant, served)
        elif isinstance(layer, VocabParallelEmbedding):
            remade |= _decide_vocabulary(layer, places, served)
    remade |= decide_experts(model, served)
    if unknown:
        remade |= _decide_left_over(model, unknown, served)
    tie_again(model, tied, served)
    _report(served)
    return remade


def _report(served: ServedModel) -> None:
    """Tell the format what was decided, and say what it finds odd about that."""
    findings = list(served.format.review(served.layers))
    for finding in findings:
        if finding.severity != "error":
            logger.log(logging.WARNING if finding.severity == "warning" else logging.INFO, "%s", finding)
    raise_findings(findings)


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
    # Some member may have nothing but a bias.
    absent = absent or tuple(m for m in modules if m in served.modules and not served.modules[m].has("weight"))
    if absent:
        served.absent_members[path] = absent
    return path, quant


def _decide_vocabulary(layer: VocabParallelEmbedding, places: list[str], served: ServedModel) -> bool:
    """Whether a head or an embedding was made again. Those that the checkpoint lacks are float, or tied."""
    decided: dict[str, LayerQuant] = {}
    for path in places:
        modules = served.paths.stored_at.get(path, ())
        try:
            if modules:
                decided[path] = served.resolve(path, modules, layer_class(layer))
        except UnknownLayerError:
            continue  # not described
    if len(decided) > 1 and any(quant.quant_type is not None for quant in decided.values()):
        raise stored_apart([*decided])
    remade = [_apply_decision(path, layer, quant, served) for path, quant in decided.items()]
    return any(remade)


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
            if isinstance(layer, LinearBase):
                method.refuse_bias_added_twice(layer)  # again: now it is known whether there is one
            return False
    elif quant.quant_type is None:
        return False
    name = compat.build_name(layer)
    logger.info("%s: decided by its path in the model, vLLM had named it %r while building", path, name)
    for name in list(layer._parameters):
        if name != "bias":
            delattr(layer, name)
    layer.quant_method = method_for(layer, path, served.format, quant, served.made_up)
    layer.quant_method.create_weights(
        layer,
        *compat.weight_sizes(layer),
        layer.params_dtype,
        weight_loader=getattr(layer, "weight_loader_v2", layer.weight_loader),
    )
    compat.tell_ranks(layer)
    return True


def _decide_left_over(model: nn.Module, unknown: dict[str, LinearBase], served: ServedModel) -> bool:
    """Layers without weights are the model's affair, unless its loader puts quantised weights there, or fails to."""
    answer = ask_loader(model, unknown, served.left_over())
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
