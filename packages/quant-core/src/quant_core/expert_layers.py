"""A layer of experts, whose halves are stacks of linear layers: what a format says of it, and what schemes are told."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from quant_core.errors import LayerResolutionError, LimitError
from quant_core.queries import LayerQuant, LayerQuery
from quant_core.schemes.activations import is_gated
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.context import (
    GATE_UP,
    ExpertsContext,
    ExpertSizes,
    LinearContext,
    LinearSizes,
    Shard,
)
from quant_core.stored import StoredForm


def experts_quant(ask: Callable[[LayerQuery], LayerQuant], query: LayerQuery) -> LayerQuant:
    """How the experts of a layer are quantised: each half as a linear layer, whose members must agree.

    Args:
        ask: a format's `layer_quant`, which is asked as for linear layers.
        query: with the modules of every expert.

    Raises:
        UnknownLayerError: if the checkpoint lacks modules.
        LayerResolutionError: if the query names no experts, those of a half disagree, or one half is float and the
            other is not.

    """
    if not query.experts:
        raise LayerResolutionError(
            f"{query.name}: a question about experts names the modules of none",
            expected="LayerQuery.experts, the modules of each half",
        )
    halves = {}
    for prefix, experts in query.experts.items():
        modules = tuple(dict.fromkeys(module for members in experts for module in members))
        asked = replace(
            query, layer_type="linear", modules=modules, experts={}, sizes=_linear_sizes(query.sizes, prefix)
        )
        halves[prefix] = ask(asked)
    modules = tuple(module for half in halves.values() for module in half.modules)
    evidence = tuple(half.evidence[0] for half in halves.values() if half.evidence)
    types = {prefix: half.quant_type for prefix, half in halves.items()}
    named = list(dict.fromkeys(quant_type for quant_type in types.values() if quant_type is not None))
    if not named:
        return LayerQuant(None, modules, evidence=evidence, reason=next(iter(halves.values())).reason)
    if None in types.values():
        raise LayerResolutionError(
            f"{query.name}: one half of these experts is quantised, the other is float",
            found="; ".join(str(entry) for entry in evidence),
            expected="both quantised, of one type or of two, or both float",
            todo="quantise gate, up and down of the experts, or none of them",
        )
    return LayerQuant(" and ".join(named), modules, evidence=evidence, halves=halves)


def _linear_sizes(sizes: object, prefix: str) -> LinearSizes | None:
    if not isinstance(sizes, ExpertSizes):
        return None
    inputs, outputs = _features(sizes, prefix)
    return LinearSizes(inputs, (outputs,))


def _features(sizes: ExpertSizes, prefix: str) -> tuple[int, int]:
    """Input and output features of each member of a half, over all ranks."""
    there, back = (sizes.hidden_size, sizes.intermediate_size), (sizes.intermediate_size, sizes.hidden_size)
    return there if prefix == GATE_UP else back


def experts_context(
    query: LayerQuery, quant: LayerQuant, linear: Mapping[str, type[AscendLinearScheme]]
) -> ExpertsContext:
    """What a scheme is told of the experts of this rank.

    Args:
        query: the engine's question, with sizes.
        quant: the format's answer.
        linear: the linear scheme of each half.

    Raises:
        LimitError: if the query has no sizes of experts, or they cannot be cut.

    """
    sizes = query.sizes
    if not isinstance(sizes, ExpertSizes):
        raise LimitError(f"{query.name}: experts need the sizes of experts", found=type(sizes).__name__)
    if sizes.intermediate_size % query.partition.size:
        raise LimitError(
            f"{query.name}: experts cannot be cut over {query.partition.size} tensor-parallel ranks",
            found=f"{sizes.intermediate_size} intermediate features",
            todo="use a tensor_parallel_size that divides them, or enable_expert_parallel",
            layer=query.name,
        )
    halves = {prefix: _half(prefix, sizes, query, half, linear[prefix]) for prefix, half in quant.halves.items()}
    return ExpertsContext(
        name=query.name,
        params_dtype=query.params_dtype,
        partition=query.partition,
        role=query.role,
        sizes=sizes,
        halves=halves,
    )


def _half(
    prefix: str, sizes: ExpertSizes, query: LayerQuery, quant: LayerQuant, linear: type[AscendLinearScheme]
) -> LinearContext:
    inputs, outputs = _features(sizes, prefix)
    column = prefix == GATE_UP
    members = 2 if column and is_gated(sizes) else 1
    experts = query.experts[prefix]
    # One module may hold gate and up.
    stack = tuple(
        experts[index] * (members // len(experts[index])) for index in sizes.local_experts or range(sizes.num_experts)
    )
    known = {form.module: usual_form(form, linear) for form in quant.stored}
    partition = query.partition
    return LinearContext(
        name=f"{query.name} ({'gate and up' if members == 2 else 'up' if column else 'down'})",
        params_dtype=query.params_dtype,
        stored=tuple(known[module] for modules in stack for module in modules) if known else (),
        partition=replace(partition, kind="column", max_over_ranks=None) if column else replace(partition, kind="row"),
        role=query.role,
        shards=tuple(Shard(name, outputs, outputs // partition.size if column else outputs) for name in stack[0]),
        input_size=inputs,
        stack=stack,
    )


def usual_form(form: StoredForm, scheme_class: type[Scheme] | None) -> StoredForm:
    """A module of whose weight its format states nothing, with the usual form of its type."""
    if form.weight is not None or scheme_class is None or not issubclass(scheme_class, AscendLinearScheme):
        return form
    return form if "get_weight" in scheme_class.declares else replace(form, weight=scheme_class.stores)
