"""Where the loader of a built model puts each module of a checkpoint.

A model renames what it loads, level by level, and fuses neighbours. It tells how by data: a `WeightsMapper` and a
packed-modules mapping at every level. Names are compared component by component.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vllm_ascend_quant import compat

_SHARD_ORDER = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


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
            for path, shards in self._paths(module):
                # A list: the tensor is loaded into each of these members. A tuple: it is cut into them.
                for shard in shards if isinstance(shards, list) else [shards]:
                    if (shard, module) not in found[path]:
                        found[path].append((shard, module))
        self.stored_at: dict[str, tuple[str, ...]] = {path: in_shard_order(members) for path, members in found.items()}

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

    def find(self, path: str, packed_modules: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The checkpoint modules of the layer at `path`, and the members of a fused layer that the checkpoint lacks.

        Both are empty if it knows nothing of the layer.
        """
        if path in self.stored_at:
            return self.stored_at[path], ()
        parent, _, last = path.rpartition(".")
        partial: tuple[tuple[str, ...], tuple[str, ...]] = (), ()
        for packed in (*self._packed_above(path), packed_modules):
            wanted = [f"{parent}.{member}" if parent else member for member in packed.get(last, ())]
            found = tuple(module for member in wanted for module in self.stored_at.get(member, ()))
            absent = tuple(member for member in wanted if member not in self.stored_at)
            if found and not absent:
                return found, ()
            partial = partial if partial[0] or not found else (found, absent)
        return partial

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


def in_shard_order(members: Iterable[tuple[Any, str]]) -> tuple[str, ...]:
    """The modules of (shard id, module) in the order in which a fused layer holds them."""
    return tuple(module for _, module in sorted(members, key=lambda member: _order(member[0])))


def _order(shard: Any) -> tuple[int, str]:
    if isinstance(shard, str):
        return _SHARD_ORDER.get(shard, len(_SHARD_ORDER)), shard
    first = shard[0] if isinstance(shard, tuple) and shard else shard
    return (first if isinstance(first, int) else 0), ""
