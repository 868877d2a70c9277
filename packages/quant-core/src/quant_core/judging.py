"""From a format's answer about a layer to its scheme: the one place that judges whether a layer can be served."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from quant_core.errors import Finding, LimitError, LoadError, QuantError, UnsupportedSchemeError, raise_findings
from quant_core.expert_layers import experts_context, usual_form
from quant_core.queries import LayerQuant, LayerQuery
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.caches import AscendAttentionScheme
from quant_core.schemes.composed import compose, reasons_against
from quant_core.schemes.context import (
    AttentionContext,
    AttentionSizes,
    ExpertsContext,
    ExpertSizes,
    LayerContext,
    LinearContext,
    LinearSizes,
    Shard,
)
from quant_core.schemes.experts import AscendMoEScheme, MixedExperts
from quant_core.schemes.registry import require_scheme_class
from quant_core.schemes.verify import verify_stored
from quant_core.stored import StoredForm


def create_scheme(query: LayerQuery, quant: LayerQuant) -> Scheme:
    """The scheme for a format's answer about a quantised layer.

    Raises:
        UnsupportedSchemeError: if no scheme is registered for the type, or it cannot serve this form of it.
        LoadError: if the files do not hold what the scheme loads, or members are stored in different forms.
        LimitError: if the engine has more or fewer members than the checkpoint.

    """
    assert quant.quant_type is not None
    if quant.halves:
        return _create_experts(query, quant)
    where = "; ".join(str(evidence) for evidence in quant.evidence[:3]) or None
    asked = query.name if where is None else f"{query.name} ({where})"
    scheme_class = require_scheme_class(quant.quant_type, query.layer_type, where=asked)
    context = layer_context(query, quant, scheme_class)
    reasons = reasons_against(scheme_class, context)
    if reasons:
        raise UnsupportedSchemeError(
            f"{query.name}: the type {quant.quant_type} cannot be served here",
            where=where,
            found="; ".join(reasons),
            layer=query.name,
        )
    scheme = compose(scheme_class, context)
    if isinstance(scheme, AscendAttentionScheme):
        raise_findings(scheme.problems())
    if isinstance(scheme, AscendLinearScheme):
        verify_stored(scheme)
        _check_agreement(scheme.context)
    return scheme


def _create_experts(query: LayerQuery, quant: LayerQuant) -> AscendMoEScheme:
    """One scheme for both halves, or one for each."""
    classes: dict[str, type[AscendMoEScheme]] = {}
    for prefix, half in quant.halves.items():
        assert half.quant_type is not None
        found = require_scheme_class(half.quant_type, "moe", where=f"{query.name} ({half.evidence[0]})")
        assert issubclass(found, AscendMoEScheme)
        classes[prefix] = found
    context = experts_context(query, quant, {prefix: found.linear for prefix, found in classes.items()})
    schemes: dict[str, AscendMoEScheme] = {}
    for found in dict.fromkeys(classes.values()):
        own = {prefix: half for prefix, half in context.halves.items() if classes[prefix] is found}
        served = replace(context, halves=own)
        if reasons := found.can_serve(served):
            raise UnsupportedSchemeError(
                f"{query.name}: experts of the type {quant.quant_type} cannot be served here",
                where="; ".join(str(quant.halves[prefix].evidence[0]) for prefix in own) or None,
                found="; ".join(reasons),
                layer=query.name,
            )
        schemes |= dict.fromkeys(own, found.create(served))
    for prefix, scheme in schemes.items():
        verify_stored(scheme.halves[prefix])
        _check_agreement(scheme.halves[prefix].context)
    first = next(iter(schemes.values()))
    return first if first.halves.keys() == schemes.keys() else MixedExperts(context, schemes)


def judge_modules(
    modules: Iterable[tuple[str, StoredForm]], state: Callable[[str, StoredForm], StoredForm]
) -> Iterator[Finding]:
    """Judge each quantised module of a checkpoint as a linear layer, without an engine; one of those that are alike.

    Args:
        modules: (quantisation type, module under canonical suffixes).
        state: adds what the format states of a module of a type.

    """
    alike: dict[Any, list[StoredForm]] = defaultdict(list)
    for quant_type, form in modules:
        kind = frozenset((suffix, t.shape, t.dtype) for suffix, t in form.tensors.items())
        alike[quant_type, kind].append(form)
    for (quant_type, _), forms in alike.items():
        module = forms[0].module
        try:
            stated = state(quant_type, forms[0])
            create_scheme(LayerQuery(module), LayerQuant(quant_type, (module,), (stated,)))
        except QuantError as error:
            also = tuple(form.module for form in forms[1:])
            yield from (replace(finding, also=also) for finding in error.findings)


def _check_agreement(context: LinearContext) -> None:
    """Members are processed together, so what is stated of one must hold for all."""
    first = context.form
    different = [
        form.module
        for form in context.stored
        if (form.weight, form.input, form.transforms) != (first.weight, first.input, first.transforms)
    ]
    if different:
        raise LoadError(
            f"{context.name}: the members of this fused layer are stored in different forms",
            found=f"{', '.join(dict.fromkeys(different))} otherwise than {first.module}",
            expected="one packing, granularity and kind of transform",
            todo="quantise the members alike",
            layer=context.name,
        )


def layer_context(query: LayerQuery, quant: LayerQuant, scheme_class: type[Scheme] | None = None) -> LayerContext:
    """The scheme's view of a layer. Sizes of a linear layer that the engine did not give are read off the headers.

    Args:
        query: the engine's question.
        quant: the format's answer. Of a module of which it states nothing, the usual form of the type holds.
        scheme_class: the type's.

    Raises:
        LoadError: if neither tells the sizes.
        LimitError: if the engine has more or fewer members than the checkpoint, or gave sizes of another kind of layer.

    """
    quant = replace(quant, stored=tuple(usual_form(form, scheme_class) for form in quant.stored))
    common: dict[str, Any] = {
        "name": query.name,
        "params_dtype": query.params_dtype,
        "stored": quant.stored,
        "partition": query.partition,
        "role": query.role,
        "values_later": query.values_later,
    }
    sizes, wanted = query.sizes, _SIZES[query.layer_type]
    if wanted is LinearSizes and isinstance(sizes, LinearSizes | None):
        sizes = _completed(sizes or LinearSizes(), query, quant)
    if not isinstance(sizes, wanted):
        raise LimitError(
            f"{query.name}: a scheme for {query.layer_type} layers needs the sizes of one",
            found=type(sizes).__name__,
            expected=wanted.__name__,
            layer=query.name,
        )
    if isinstance(sizes, ExpertSizes):
        return ExpertsContext(sizes=sizes, **common)
    if isinstance(sizes, AttentionSizes):
        return AttentionContext(sizes=sizes, **common)
    members = _members(quant, sizes.output_sizes)
    local = sizes.local_output_sizes or sizes.output_sizes
    if not len(members) == len(sizes.output_sizes) == len(local):
        raise LimitError(
            f"{query.name}: the engine fuses {len(sizes.output_sizes)} members ({len(local)} on this rank), the "
            f"checkpoint has {len(members)}",
            found=", ".join(quant.modules),
            layer=query.name,
        )
    modules = [quant.modules[index] for index in members]
    common["stored"] = tuple(quant.stored[index] for index in members) if quant.stored else ()
    shards = tuple(Shard(*member) for member in zip(modules, sizes.output_sizes, local, strict=True))
    assert sizes.input_size is not None, "completed above"
    return LinearContext(shards=shards, input_size=sizes.input_size, has_bias=query.has_bias, **common)


_SIZES: dict[str, type[LinearSizes | ExpertSizes | AttentionSizes]] = {
    "linear": LinearSizes,
    "moe": ExpertSizes,
    "attention": AttentionSizes,
}


def _completed(sizes: LinearSizes, query: LayerQuery, quant: LayerQuant) -> LinearSizes:
    """Sizes with what the engine did not give, from the files."""
    if sizes.input_size is not None and sizes.output_sizes:
        return sizes
    told = []
    for form in quant.stored or (StoredForm(query.name),):
        stored = form.sizes()
        if stored is None or 0 in stored:
            raise LoadError(
                f"{form.module}: the stored tensors do not tell the layer's sizes, which are at least 1",
                found=", ".join(f"{t.name} {list(t.shape)}" for t in form.tensors.values()) or "no tensor of this name",
                layer=query.name,
            )
        told.append(stored)
    inputs = told[0][0] if sizes.input_size is None else sizes.input_size
    outputs = sizes.output_sizes or tuple(output for _, output in told)
    return LinearSizes(inputs, outputs, sizes.local_output_sizes)


def _members(quant: LayerQuant, sizes: Sequence[int]) -> list[int]:
    """For each member of the engine's layer, which module it is loaded from: one that is fused on disk has several.

    As many as there are modules where sizes do not tell: whoever counts them says what is wrong.
    """
    modules = list(range(len(quant.modules)))
    if len(modules) == 1:
        return modules * max(1, len(sizes))
    if len(modules) >= len(sizes):
        return modules
    members: list[int] = []
    for index, form in enumerate(quant.stored):
        _, left = form.sizes() or (0, 0)
        while left > 0 and len(members) < len(sizes):
            left -= sizes[len(members)]
            members.append(index)
        if left != 0:
            return modules
    return members
