"""Where the loader of a built model puts each module of a checkpoint.

A model renames what it loads, level by level, and fuses neighbours. It tells how by data: a `WeightsMapper` and a
packed-modules mapping at every level. Names are compared component by component.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from quant_core.names import Members, ModuleNames, PackedModules
from vllm_ascend_quant import compat

_SHARD_ORDER = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


class ModelPaths:
    """Where the loader puts each checkpoint module. Found out once; the model is not kept.

    Attributes:
        stored_at: module path to the checkpoint modules that land there, in the order of their shards.

    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        renames = Renames(model)
        self._paths: dict[str, list[str]] = {}
        found: dict[str, list[tuple[Any, str]]] = defaultdict(list)
        for module in modules:
            places = list(renames.places(module))
            self._paths[module] = [path for path, _ in places]
            for path, shards in places:
                # A list: the tensor is loaded into each of these members. A tuple: it is cut into them.
                for shard in shards if isinstance(shards, list) else [shards]:
                    if (shard, module) not in found[path]:
                        found[path].append((shard, module))
        self.stored_at: dict[str, tuple[str, ...]] = {path: in_shard_order(members) for path, members in found.items()}
        self._names = ModuleNames(self.stored_at)
        self._packed = packed_mappings(model)

    def paths_of(self, module: str) -> list[str]:
        """The paths at which a checkpoint module may land."""
        return self._paths[module]

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

    def members(self, path: str, packed_modules: PackedModules) -> Members:
        """What the checkpoint has of the layer at `path`: by the mappings of the modules around it, or the last one."""
        return self._names.members(path, *self._packed_around(path), packed_modules)

    def _packed_around(self, path: str) -> Iterator[PackedModules]:
        """The packed-modules mappings of the modules around a layer, nearest first."""
        while path:
            path = path.rpartition(".")[0]
            if path in self._packed:
                yield self._packed[path]


class Renames:
    """What the mappers of a model and of the modules inside it make of a checkpoint's names."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def places(self, module: str) -> Iterator[tuple[str, Any]]:
        """Path and shard id of a checkpoint module, as the nested loaders would rename it; several may be possible."""
        pending: list[tuple[str, str, Any]] = [("", f"{module}.weight", None)]
        seen = set()
        while pending:
            base, rest, shard = pending.pop()
            if (base, rest) in seen:
                continue
            seen.add((base, rest))
            mapper = self._mapper(base)
            variants = [(rest, shard)]
            if mapper is not None:
                mapped = compat.map_name(mapper, rest)
                # A child's mapper may or may not be used by its parent's loader; the model's own is.
                variants = variants if base else []
                if mapped is not None:
                    variants.append((mapped[0], shard if mapped[1] is None else mapped[1]))
            for name, new_shard in variants:
                yield f"{base}.{name}".strip(".").removesuffix(".weight"), new_shard
                parts = name.split(".")
                for end in range(1, len(parts)):
                    child = ".".join(filter(None, [base, *parts[:end]]))
                    if child not in self._modules:
                        break
                    if self._mapper(child) is not None:
                        pending.append((child, ".".join(parts[end:]), new_shard))

    def _mapper(self, path: str) -> Any:
        return getattr(self._modules[path], "hf_to_vllm_mapper", None)


def beside_weight(model: nn.Module, name: str) -> str:
    """The name under which a model's own mapper puts a tensor beside its module's weight.

    Some rename `0.weight` and not `0.deq_scale`. The renamed name does then, if the mapper leaves that as it is.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    module, _, suffix = name.rpartition(".")
    weight = None if mapper is None or suffix == "weight" else compat.map_name(mapper, f"{module}.weight")
    if weight is None:
        return name
    wanted = f"{weight[0].removesuffix('.weight')}.{suffix}", weight[1]
    if compat.map_name(mapper, name) == wanted or compat.map_name(mapper, wanted[0]) != wanted:
        return name
    return wanted[0]


def modules_with_paths(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module once, with all its paths: models register one under several names, the loader uses any of them."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def packed_mappings(model: nn.Module) -> dict[str, PackedModules]:
    """The packed-modules mappings by the paths of the modules that have one."""
    found = (
        (path, getattr(module, "packed_modules_mapping", None))
        for path, module in model.named_modules(remove_duplicate=False)
    )
    return {path: packed for path, packed in found if isinstance(packed, Mapping)}


def without_prefix(name: str, prefix: str) -> str:
    """A name inside a model that was built under a prefix."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def in_shard_order(members: Iterable[tuple[Any, str]]) -> tuple[str, ...]:
    """The modules of (shard id, module) in the order in which a fused layer holds them."""
    return tuple(module for _, module in sorted(members, key=lambda member: _order(member[0])))


def _order(shard: Any) -> tuple[int, str]:
    if isinstance(shard, str):
        return _SHARD_ORDER.get(shard, len(_SHARD_ORDER)), shard
    first = shard[0] if isinstance(shard, tuple) and shard else shard
    return (first if isinstance(first, int) else 0), ""
