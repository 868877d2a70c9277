"""Seeing that everything was loaded, at the first load and at every reload.

vLLM checks this for unquantised models only: a quantised one starts and answers nonsense when a tensor is absent.
"""

from collections.abc import Iterable

from torch import nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LoadError, QuantFormat
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.loading.explaining import layers_hint
from vllm_ascend_quant.loading.floats import filled_in_parts, unfilled, vocabulary_layers
from vllm_ascend_quant.loading.stream import give_up
from vllm_ascend_quant.methods.cache import AscendKVCacheMethod
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.served_model import ServedModel


def check_loaded(model: nn.Module, served: ServedModel) -> None:
    """After the first load, before processing.

    Raises:
        LoadError: lists the parameters that nothing was loaded into, or tensors that the model has no place for.

    """
    called, reported, _ = served.loading.take()
    in_parts = {id(param) for layer in filled_in_parts(model).values() for param in layer.parameters(recurse=False)}
    inside: set[frozenset[str]] = set()
    others: set[frozenset[str]] = set()
    for aliases, param in _parameters_with_names(model):
        if not _exempt(model.get_submodule(aliases[0].rpartition(".")[0]), param):
            (inside if id(param) in in_parts else others).add(frozenset(aliases))
    # These are seen to by what they hold: some models fill more of them than they report.
    certain = {aliases for aliases in inside if not aliases.isdisjoint(reported or ())}
    served.loading.expected = frozenset(others | certain)
    if not called:
        return
    check_biases(model, served)
    members, absent = unfilled(model, served)
    absent += [min(aliases) for aliases in others if reported is not None and reported.isdisjoint(aliases)]
    if members or absent:
        raise _not_loaded(members, absent, served.format)


def _not_loaded(members: list[str], others: list[str], quant_format: QuantFormat) -> LoadError:
    """What to say of tensors that did not come: members of fused layers, of which others came, and the rest."""
    names, folder = [*members, *others], quant_format.folder
    lacking = [name for name in names if name not in folder.tensors]
    searched = f"no tensor {listing(lacking)} in {listing(folder.weight_files)}" if lacking else None
    found = "; ".join(filter(None, [searched, layers_hint(quant_format)])) or None
    todo = "check that config.json describes the model whose weights these are, and that no file is missing"
    if not lacking:
        found, todo = "the files hold all of them", "vLLM's loader of this model left them out: report the architecture"
    elif not others:
        todo = "the other members of these layers are there, so the files are incomplete: download or write them again"
    return LoadError(
        f"{len(names)} of the model's parameters were not loaded: {listing(names)}",
        where=folder.path,
        found=found,
        todo=todo,
    )


def check_reloaded(model: nn.Module, served: ServedModel) -> None:
    """At the end of a reload, before vLLM puts the old weights back where nothing came.

    Raises:
        LoadError: lists what the reload left out. Layers that were left out keep their old weights.

    """
    loading = served.loading
    called, reported, came = loading.take()
    if not called:
        return
    left_out = {
        path: _left_out(path, layer, served, came)
        for path, layer in (filled_in_parts(model) | vocabulary_layers(model)).items()
        if compat.incomplete_at_reload(layer)
    }
    absent = [
        min(aliases)
        for aliases in loading.expected
        if reported is not None
        and reported.isdisjoint(aliases)
        and not any(left_out.get(name.rpartition(".")[0]) for name in aliases)
    ]
    absent += {name for names in left_out.values() for name in names}
    if absent:
        give_up(model, served)
        raise LoadError(
            f"the reload left out {len(absent)} of the model's parameters: {listing(sorted(absent))}",
            todo="send all tensors of the checkpoint; until then the engine holds a mixture of old and new weights",
        )
    check_biases(model, served)
    loading.held = served.model_config.model


def _left_out(path: str, layer: nn.Module, served: ServedModel, came: set[str]) -> list[str]:
    """The tensors that a layer lacks which a reload filled in part.

    What the files have of it is asked, since vLLM counts elements and expects more than they have: it pads a
    vocabulary, may fill a tied head through the embedding, and leaves a default as it is.
    """
    method = layer.quant_method
    missing = method.missing(layer) if isinstance(method, AscendLinearMethod) else []
    forms = [served.modules[module] for module in _modules_of(path, layer, served) if module in served.modules]
    stored = {tensor.name for form in forms for tensor in form.tensors.values()}
    if not stored and not isinstance(layer, VocabParallelEmbedding):  # an engine that was started without any file
        return missing or [f"a part of {path}"]
    return list(dict.fromkeys([*missing, *sorted(stored - came)]))


def _modules_of(path: str, layer: nn.Module, served: ServedModel) -> Iterable[str]:
    """The checkpoint modules that belong to a layer."""
    if path in served.layers:
        return served.layers[path].modules
    if not isinstance(layer, compat.expert_layer_class()):
        return served.paths.stored_at.get(path, ())
    above = compat.expert_prefix(layer, path)
    return (*served.paths.stored_at.get(above, ()), *served.paths.below([above])[above])


def check_biases(model: nn.Module, served: ServedModel) -> None:
    """Refuse `.bias` tensors of modules of which the model has the rest: vLLM's loaders drop them without a word.

    They come from a quantiser, and what that added must be used. A module that the model leaves out as a whole is the
    architecture's affair: some end with a norm that vLLM never asks for.

    Asked after loading, because a loader may make the parameter when it meets the tensor.

    Raises:
        LoadError: names the tensors.

    """
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = _modules_of_experts(model, served)
    lost = []
    for module, places in _bias_places(served).items():
        there = experts.get(module) or [modules[p] for p in places if p in modules and modules[p]._parameters]
        if there and not any(_takes_bias(layer) for layer in there):
            lost.append(f"{module}.bias")
    if lost:
        raise LoadError(
            f"the model has no place for {len(lost)} bias tensors of the checkpoint: {listing(lost)}",
            where=served.format.folder.path,
            expected="linear layers or RMS norms; leaving these tensors out would change every result",
            todo="biases of modules that the architecture has without come from msModelSlim's anti-outlier methods m1, "
            "m2 and m4: quantise with another method",
        )


def _takes_bias(layer: nn.Module) -> bool:
    """Whether a bias that is stored for a layer has an effect: as its parameter, or inside what else is stored."""
    method = getattr(layer, "quant_method", None)
    folded = isinstance(method, AscendLinearMethod) and method.quant_method.folds_bias
    experts = isinstance(layer, compat.expert_layer_class()) and compat.experts_have_biases(layer)
    return folded or experts or getattr(layer, "bias", None) is not None


def _modules_of_experts(model: nn.Module, served: ServedModel) -> dict[str, list[nn.Module]]:
    """The checkpoint modules of experts, which a model has no modules for, and the layer that holds them."""
    layers = {
        compat.expert_prefix(layer, path): layer
        for path, layer in model.named_modules()
        if isinstance(layer, compat.expert_layer_class())
    }
    return {module: [layers[path]] for path, below in served.paths.below(layers).items() for module in below}


def _bias_places(served: ServedModel) -> dict[str, list[str]]:
    """The checkpoint modules with a `.bias` tensor, and the modules of the model where it may belong."""
    owner = {module: path for path, quant in served.layers.items() for module in quant.modules}
    return {
        module: [owner[module]] if module in owner else served.paths.paths_of(module)
        for module, form in served.modules.items()
        if form.has("bias")
    }


def _parameters_with_names(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names: a loader reports it under any of them."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), ([], param))[0].append(name)
    return list(found.values())


def _exempt(module: nn.Module, param: nn.Parameter) -> bool:
    """Parameters that no checkpoint needs to hold, or that are seen to elsewhere.

    Those are cache scales with defaults, empty placeholders, and the scales of our caches, which go past the model.
    """
    method = getattr(module, "quant_method", None)
    return param.numel() == 0 or isinstance(method, (BaseKVCacheMethod, AscendKVCacheMethod))
