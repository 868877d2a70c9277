"""Which modules of a checkpoint the experts of a layer are loaded from."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from quant_core import DOWN, GATE_UP, LayerQuery, LayerResolutionError, QuantFormat
from quant_core.errors import listing
from vllm_ascend_quant import compat

#: The checkpoint modules of every expert over all ranks, by half, expert and member.
ExpertModules = Mapping[str, tuple[tuple[str, ...], ...]]

#: Children of a module that bear a number: module to {(number, name below it): checkpoint module}.
Numbered = Mapping[str, Mapping[tuple[int, str], str]]

#: How checkpoints call gate, up and down, where the names that a layer gives are not theirs.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def numbered_children(stored_at: Mapping[str, tuple[str, ...]]) -> Numbered:
    """The checkpoint modules whose names end in a number and one more component, as those of experts do.

    Args:
        stored_at: the engine's name of a module to the checkpoint's modules that are loaded into it.

    """
    found: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name, modules in stored_at.items():
        above, _, last = name.rpartition(".")
        above, _, number = above.rpartition(".")
        if number.isdecimal():
            found[above][int(number), last] = modules[0]
    return found


def expert_modules(layer: Any, name: str, numbered: Numbered, quant_format: QuantFormat) -> ExpertModules | None:
    """The modules of a layer of experts; None if the checkpoint knows no such.

    Args:
        layer: knows how many experts there are, and perhaps their names.
        name: of the layer, by the names of `numbered`.
        numbered: see numbered_children.
        quant_format: the opened checkpoint.

    Raises:
        LayerResolutionError: if experts are quantised and some are absent, or there are more than the model has.

    """
    children = numbered.get(compat.expert_prefix(layer, name), {})
    names = _names(layer, {last for _, last in children})
    if names is None:
        return None
    count = layer.moe_config.num_logical_experts
    halves = {GATE_UP: names[:-1], DOWN: names[-1:]}
    wanted = {(expert, last) for expert in range(count) for last in names}
    if children.keys() != wanted:
        _refuse_incomplete(name, children, wanted, quant_format)
        return None
    return {
        half: tuple(tuple(children[expert, last] for last in own) for expert in range(count))
        for half, own in halves.items()
    }


def told_modules(told: Mapping[tuple[int, str], str], count: int) -> ExpertModules | None:
    """The modules of a layer of so many experts, by what its loader did with them; None if it took only some.

    Args:
        told: checkpoint module by expert and vLLM's shard: `w1` and `w3` are gate and up, `w2` is down.
        count: how many experts the layer has.

    """
    gate_up = ("w1", "w3") if any(shard == "w3" for _, shard in told) else ("w1",)
    if told.keys() != {(expert, shard) for expert in range(count) for shard in (*gate_up, "w2")}:
        return None
    return {
        half: tuple(tuple(dict.fromkeys(told[expert, shard] for shard in shards)) for expert in range(count))
        for half, shards in ((GATE_UP, gate_up), (DOWN, ("w2",)))
    }


def _names(layer: Any, there: set[str]) -> tuple[str, ...] | None:
    """What the checkpoint calls the projections of an expert: gate and up, or what both are fused in, and down."""
    for names in (compat.expert_names(layer), *_NAMES):
        if there.issuperset(names) and names:
            return names
        if names and {"gate_up_proj", names[-1]} <= there:
            return "gate_up_proj", names[-1]
    return None


def _refuse_incomplete(
    name: str, children: Mapping[tuple[int, str], str], wanted: set[tuple[int, str]], quant_format: QuantFormat
) -> None:
    """Refuse quantised experts that are not those of the model; float ones are loaded, and judged, by vLLM."""
    quants = [quant_format.layer_quant(LayerQuery(module, modules=(module,))) for module in children.values()]
    if all(quant.quant_type is None for quant in quants):
        return
    absent = sorted(wanted - children.keys())
    surplus = [children[key] for key in sorted(children.keys() - wanted)]
    problems = [f"{len(absent)} are absent: {listing(f'{e}.{last}' for e, last in absent)}"] if absent else []
    problems += [f"{len(surplus)} have no place: {listing(surplus)}"] if surplus else []
    raise LayerResolutionError(
        f"{name}: the projections of experts in the checkpoint are not those of the model",
        found="; ".join(problems),
        expected=f"{len(wanted)} of {1 + max(e for e, _ in wanted)} experts",
        where=str(quant_format.folder.path),
        todo="check that config.json describes the model that was quantised, and that no file is missing",
    )


def is_expert_layer(module: nn.Module) -> bool:
    """Whether a module holds routed experts."""
    return isinstance(module, compat.expert_layer_class())
