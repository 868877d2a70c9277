"""Deciding every layer by its path in the built model.

While a model is being built, vLLM names each layer by a prefix that is only a hint: for some architectures it is empty
or differs from the module's path, and the mapping of fused modules may be completed later. What counts is where the
loader will put a tensor. So each checkpoint module's name is sent through the model's own renaming, level by level as
the loader does it, and layers that were decided otherwise are made again.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LayerQuant, LayerResolutionError, UnknownLayerError
from quant_core.errors import listing
from vllm_ascend_quant import compat
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.methods.linear import AscendLinearMethod

logger = init_logger("vllm.ascend_quant")

_SHARD_ORDER = {"q": 0, "k": 1, "v": 2}


class ModelPaths:
    """Where the loader puts each checkpoint module.

    Attributes:
        stored_at: module path to the checkpoint modules that land there, in the order of their shards.

    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        found: dict[str, list[tuple[Any, str]]] = defaultdict(list)
        for module in modules:
            for path, shard in self._paths(module):
                if (shard, module) not in found[path]:
                    found[path].append((shard, module))
        self.stored_at: dict[str, tuple[str, ...]] = {
            path: tuple(module for _, module in sorted(members, key=lambda member: _order(member[0])))
            for path, members in found.items()
        }

    def paths_of(self, module: str) -> list[str]:
        """The paths at which a checkpoint module may land."""
        return [path for path, _ in self._paths(module)]

    def below(self, paths: Collection[str]) -> Mapping[str, list[str]]:
        """For each of `paths`, the checkpoint modules that land somewhere below it."""
        found: dict[str, list[str]] = {path: [] for path in paths}
        for stored, modules in self.stored_at.items():
            parts = stored.split(".")
            for end in range(1, len(parts)):
                above = ".".join(parts[:end])
                if above in found:
                    found[above] += modules
        return found

    def find(self, path: str, packed_modules: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The checkpoint modules of the layer at `path`; empty if there is none.

        Raises:
            LayerResolutionError: if only some members of a fused layer are there.

        """
        if path in self.stored_at:
            return self.stored_at[path]
        parent, _, last = path.rpartition(".")
        for packed in (*self._packed_above(path), packed_modules):
            wanted = [f"{parent}.{member}" if parent else member for member in packed.get(last, ())]
            found = [self.stored_at[member][0] for member in wanted if member in self.stored_at]
            if found and len(found) == len(wanted):
                return tuple(found)
            if found:
                raise LayerResolutionError(
                    f"{path}: the checkpoint has only some members of this fused layer",
                    found=listing(found),
                    expected=f"also {listing(m for m in wanted if m not in self.stored_at)}",
                    todo="the checkpoint is incomplete or belongs to another architecture",
                )
        return ()

    def _paths(self, module: str) -> Iterator[tuple[str, Any]]:
        """Path and shard id of a checkpoint module, as the nested loaders would rename it; several may be possible."""
        pending: list[tuple[str, str, Any]] = [("", f"{module}.weight", None)]
        seen = set()
        while pending:
            base, rest, shard = pending.pop()
            if (base, rest) in seen:
                continue
            seen.add((base, rest))
            here = self._model if not base else self._modules.get(base)
            mapper = getattr(here, "hf_to_vllm_mapper", None)
            variants = [(rest, shard)]
            if mapper is not None:
                mapped = compat.map_name(mapper, rest)
                # A child's mapper may or may not be used by its parent's loader; the model's own is.
                variants = ([(rest, shard)] if base else []) + ([] if mapped is None else [(mapped[0], mapped[1] or shard)])
            for name, new_shard in variants:
                yield f"{base}.{name}".strip(".").removesuffix(".weight"), new_shard
                parts = name.split(".")
                for end in range(1, len(parts)):
                    child = ".".join(filter(None, [base, *parts[:end]]))
                    if child not in self._modules:
                        break
                    if getattr(self._modules[child], "hf_to_vllm_mapper", None) is not None:
                        pending.append((child, ".".join(parts[end:]), new_shard))

    def _packed_above(self, path: str) -> Iterator[Mapping[str, Sequence[str]]]:
        """The packed-modules mappings of the modules around a layer, nearest first."""
        parts = path.split(".")
        for end in range(len(parts) - 1, -1, -1):
            around = self._modules.get(".".join(parts[:end])) if end else self._model
            packed = getattr(around, "packed_modules_mapping", None)
            if isinstance(packed, Mapping):
                yield packed


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
    unknown: list[str] = []
    experts: dict[str, str] = {}
    remade = False
    config.layers.clear()
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LinearBase):
            quant = _decide(path, layer, paths, config)
            if quant is None:
                unknown.append(path)
                continue
            config.layers[path] = quant
            remade |= _apply_decision(path, layer, quant, config)
        elif isinstance(layer, VocabParallelEmbedding):
            config.refuse_quantised(path, "embedding", paths.find(path, {}))
        elif isinstance(layer, compat.expert_layer_class()):
            experts[compat.expert_prefix(layer, path)] = path
    for prefix, modules in paths.below(experts).items():
        config.refuse_quantised(experts[prefix], "moe", modules)
    if unknown:
        _refuse_left_over(unknown, config)
    return Settlement(remade, paths)


def _decide(path: str, layer: LinearBase, paths: ModelPaths, config: AscendQuantizationConfig) -> LayerQuant | None:
    modules = paths.find(path, config.packed_modules_mapping)
    if not modules:
        modules = config.find(layer.prefix, config.packed_modules_mapping)
    if not modules:
        return None
    try:
        return config.resolve(path, modules)
    except UnknownLayerError:
        return None


def _apply_decision(path: str, layer: LinearBase, quant: LayerQuant, config: AscendQuantizationConfig) -> bool:
    method = layer.quant_method
    if isinstance(method, AscendLinearMethod):
        method.name = path
        if (method.quant.quant_type, method.quant.modules) == (quant.quant_type, quant.modules):
            return False
    elif quant.quant_type is None:
        return False
    logger.info("%s: decided by its path in the model, vLLM had named it %r while building", path, layer.prefix)
    for name in list(layer._parameters):
        if name != "bias":
            delattr(layer, name)
    layer.quant_method = config.linear_method(path, quant)
    layer.quant_method.create_weights(
        layer,
        getattr(layer, "input_size_per_partition", layer.input_size),
        layer.output_partition_sizes,
        layer.input_size,
        layer.output_size,
        layer.params_dtype,
        weight_loader=getattr(layer, "weight_loader_v2", layer.weight_loader),
    )
    layer.update_param_tp_status()
    return True


def _refuse_left_over(unknown: list[str], config: AscendQuantizationConfig) -> None:
    """Layers without weights are the model's affair, unless quantised weights without a layer are left over."""
    assert config.format is not None
    claimed = {module for quant in config.layers.values() for module in quant.modules}
    left = []
    for module, form in config.format.folder.modules.items():
        if module not in claimed and form.has("weight") and config.resolve(module, (module,)).quant_type is not None:
            left.append(module)
    if left:
        raise LayerResolutionError(
            f"{len(unknown)} linear layers of the model have no weights in the checkpoint: {listing(unknown)}",
            found=f"quantised modules that belong to no layer: {listing(left)}",
            where=config.format.folder.path,
            todo="check that config.json describes the model that was quantised; if it does, report the architecture",
        )


def _order(shard: Any) -> tuple[int, str]:
    if isinstance(shard, str):
        return _SHARD_ORDER.get(shard, len(_SHARD_ORDER)), shard
    if isinstance(shard, (tuple, list)):
        return (int(shard[0]) if shard and isinstance(shard[0], int) else 0), ""
    return (shard if isinstance(shard, int) else 0), ""
