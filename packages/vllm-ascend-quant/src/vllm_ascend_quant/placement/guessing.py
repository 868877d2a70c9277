"""The names that a checkpoint without weights would have for the modules of a model.

Where there are weight files, their headers tell. Without them (`load_format="dummy"` on a folder of JSON files) a
model's own names are turned back through its mappers, and a name counts that the mappers lead to the module again.
Which of several is the checkpoint's, its format knows; one that knows layers by pattern only takes any.
"""

from collections.abc import Iterator, Mapping

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LayerQuery, LayerResolutionError, QuantFormat
from quant_core.names import PackedModules
from vllm_ascend_quant.placement.paths import Renames, packed_mappings


def guessed_modules(model: nn.Module, quant_format: QuantFormat) -> list[str]:
    """For each linear and vocabulary layer and each of its members, the first name that the format knows."""
    renames, packed = Renames(model), packed_mappings(model)
    mappers = [getattr(module, "hf_to_vllm_mapper", None) for module in model.modules()]
    rules = list(dict.fromkeys(rule for mapper in mappers if mapper is not None for rule in _rules(mapper)))
    found = []
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            for member in _members(path, packed):
                # A mapper may say itself which fused layer a member belongs to.
                names = [n for n in _turned_back(member, rules) if {member, path} & {p for p, _ in renames.places(n)}]
                found += [name for name in names if _known(name, quant_format)][:1]
    return found


def _members(path: str, packed: Mapping[str, PackedModules]) -> list[str]:
    """The members of a layer, by the nearest mapping that has any; itself where it is not fused."""
    parent, _, last = path.rpartition(".")
    around = path
    while around:
        around = around.rpartition(".")[0]
        if members := packed.get(around, {}).get(last):
            return [f"{parent}.{member}" if parent else member for member in members]
    return [path]


def _rules(mapper: object) -> Iterator[tuple[str, str]]:
    """What a mapper replaces, and by what: prefixes and parts of names."""
    for kind in ("orig_to_new_prefix", "orig_to_new_substr"):
        for old, new in (getattr(mapper, kind, None) or {}).items():
            if isinstance(new, str):
                yield old, new


def _turned_back(path: str, rules: list[tuple[str, str]]) -> Iterator[str]:
    """Names that may have become this path, the most changed first."""
    for old, new in rules:
        if new and new in path:
            yield path.replace(new, old, 1)
        elif not new:
            yield f"{old}{path}"
    yield path


def _known(name: str, quant_format: QuantFormat) -> bool:
    try:
        quant_format.layer_quant(LayerQuery(name, modules=(name,)))
    except LayerResolutionError:
        return False
    return True
