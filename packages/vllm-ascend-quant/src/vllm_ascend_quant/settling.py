"""Deciding every layer by its path in the built model.

While a model is being built, vLLM names each layer by a prefix that is only a hint: for some architectures it is empty
or differs from the module's path, and the mapping of fused modules may be completed later. What counts is where the
loader will put a tensor (naming.py), so layers that were decided otherwise are made again.
"""

from dataclasses import dataclass

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LayerQuant, LayerResolutionError, LimitError, UnknownLayerError
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.naming import ModelPaths
from vllm_ascend_quant.probing import ask_loader

logger = init_logger("vllm.ascend_quant")


@dataclass(frozen=True)
class Settlement:
    """What was decided about a built model.

    Attributes:
        remade: whether any layer was made again.
        paths: where the loader puts each checkpoint module.

    """

    remade: bool
    paths: ModelPaths


def settle_layers(model: nn.Module, config: AscendQuantizationConfig) -> Settlement:
    """Decide each layer of a built model by its path; make those again that were decided otherwise.

    Raises:
        QuantError: if a layer cannot be decided or served, or quantised weights would belong to no layer.

    """
    assert config.format is not None
    paths = ModelPaths(model, list(config.format.folder.modules))
    unknown: dict[str, LinearBase] = {}
    experts: dict[str, str] = {}
    remade = False
    config.layers.clear()
    for layer, places in _modules_with_paths(model):
        if isinstance(layer, LinearBase):
            path, quant = _decide(layer, places, paths, config)
            if quant is None:
                unknown[path] = layer
                continue
            config.layers[path] = quant
            remade |= _apply_decision(path, layer, quant, config)
        elif isinstance(layer, VocabParallelEmbedding):
            remade |= _settle_vocabulary(layer, places, paths, config)
        elif isinstance(layer, compat.expert_layer_class()):
            experts |= {compat.expert_prefix(layer, path): path for path in places}
    for prefix, stored in paths.below(experts).items():
        config.refuse_quantised(experts[prefix], "moe", stored)
    if unknown:
        remade |= _settle_left_over(model, unknown, config)
    return Settlement(remade, paths)


def _modules_with_paths(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module once, with all its paths: models register one under several names, the loader uses any of them."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def _decide(
    layer: LinearBase, places: list[str], paths: ModelPaths, config: AscendQuantizationConfig
) -> tuple[str, LayerQuant | None]:
    """The path under which the loader fills a layer, and the format's answer; None if the checkpoint lacks it."""
    found = ((place, *paths.find(place, config.packed_modules_mapping)) for place in places)
    path, modules, absent = next((answer for answer in found if answer[1]), (places[0], (), ()))
    try:
        quant = config.resolve(path, modules or _modules_by_hint(layer, config))
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


def _settle_vocabulary(
    layer: VocabParallelEmbedding, places: list[str], paths: ModelPaths, config: AscendQuantizationConfig
) -> bool:
    """Whether a head or an embedding was made again. Those that the checkpoint lacks are float, or tied."""
    remade = False
    _check_own_weight(layer, places[0])
    for path in places:
        modules = paths.stored_at.get(path, ())
        try:
            quant = config.resolve(path, modules) if modules else None
        except UnknownLayerError:
            quant = None
        if quant is None:
            continue  # not described, or tied
        if quant.quant_type is not None and len(places) > 1:
            raise _tied(path, places)
        config.layers[path] = quant
        remade |= _apply_decision(path, layer, quant, config)
    return remade


def _check_own_weight(layer: VocabParallelEmbedding, path: str) -> None:
    """Refuse a head that was given the weight of an embedding, if either is quantised.

    vLLM ties them where the files hold one of them; an older vLLM where they hold both.
    """
    method = layer.quant_method
    name = method.name if isinstance(method, AscendLinearMethod) else None
    own = {param for param_name, param in layer.named_parameters(recurse=False) if param_name != "bias"}
    if any(getattr(param, "owner", None) != name for param in own):
        raise _tied(path, [path, "an embedding"])


def _tied(path: str, layers: list[str]) -> LimitError:
    return LimitError(
        f"{path}: the model ties it to another layer, and their weight is quantised",
        found=f"one weight for {listing(layers)}",
        expected="a float weight, or one of its own for each",
        todo="leave the embedding in float, or save the head beside it and set tie_word_embeddings to false",
    )


def _modules_by_hint(layer: LinearBase, config: AscendQuantizationConfig) -> tuple[str, ...]:
    """For loaders that rename by code of their own: to most likely the name that vLLM gave while building."""
    try:
        modules = config.find(layer.prefix, config.packed_modules_mapping)
    except LayerResolutionError:
        modules = ()
    if not modules:
        raise UnknownLayerError(f"{layer.prefix}: no module of the checkpoint has this name")
    return modules


def _apply_decision(
    path: str, layer: LinearBase | VocabParallelEmbedding, quant: LayerQuant, config: AscendQuantizationConfig
) -> bool:
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
    layer.quant_method = config.method(layer, path, quant)
    layer.quant_method.create_weights(
        layer,
        *compat.weight_sizes(layer),
        layer.params_dtype,
        weight_loader=getattr(layer, "weight_loader_v2", layer.weight_loader),
    )
    layer.update_param_tp_status()  # type: ignore[no-untyped-call]
    return True


def _settle_left_over(model: nn.Module, unknown: dict[str, LinearBase], config: AscendQuantizationConfig) -> bool:
    """Layers without weights are the model's affair, unless its loader puts quantised weights there, or fails to."""
    assert config.format is not None
    claimed = {module for quant in config.layers.values() for module in quant.modules}
    left = [
        form
        for module, form in config.format.folder.modules.items()
        if module not in claimed and form.has("weight") and config.resolve(module, (module,)).quant_type is not None
    ]
    answer = ask_loader(model, unknown, left)
    remade = False
    for path, modules in answer.stored_at.items():
        config.layers[path] = config.resolve(path, modules)
        remade |= _apply_decision(path, unknown.pop(path), config.layers[path], config)
    if answer.refused and unknown:
        module, complaint = next(iter(answer.refused.items()))
        raise LayerResolutionError(
            f"{len(unknown)} linear layers of the model have no weights in the checkpoint: {listing(unknown)}",
            found=f"quantised modules that belong to no layer: {listing(answer.refused)}",
            where=f"{config.format.folder.path}; the model's loader says of {module}: {complaint}",
            todo="check that config.json describes the model that was quantised; if it does, report the architecture",
        )
    return remade
