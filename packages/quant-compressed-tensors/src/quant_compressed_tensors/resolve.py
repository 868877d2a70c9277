"""From a module to its group: by the section, and where that is silent or ambiguous by what the files hold."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant_compressed_tensors.combinations import quant_type
from quant_compressed_tensors.matching import Match, Matcher
from quant_compressed_tensors.section import Section
from quant_compressed_tensors.stating import is_float_weight, is_quantised, stated
from quant_core import (
    Evidence,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LoadError,
    QuantError,
    StoredForm,
    UnsupportedSchemeError,
    create_scheme,
    raise_findings,
)
from quant_core.errors import listing

#: The name that writers for Ascend give to the class of routed experts.
EXPERTS = "MoEGMM"


@dataclass(frozen=True)
class Answer:
    """What is known of one module.

    Attributes:
        quant_type: the scheme's registered name; None for a float module.
        form: as it is stored.
        evidence: the entry that decided.
        reason: in words.
        group: the first group that matches, whether the module is quantised or not.

    """

    quant_type: str | None
    form: StoredForm
    evidence: Evidence
    reason: str
    group: str | None = None


class Resolver:
    """Answers about modules. What is found out about one holds for all that are alike.

    Args:
        section: what config.json says.

    """

    def __init__(self, section: Section) -> None:
        self.section = section
        served = {name: scheme.targets for name, scheme in section.groups.items() if scheme.weights is not None}
        self.matcher = Matcher(served, section.ignore, section.place)
        self._types: dict[str, str | QuantError] = {}
        self._alike: dict[tuple[object, ...], _Kind | QuantError] = {}
        self._classes = sorted({name for targets in served.values() for name in targets if name.isidentifier()})

    def of(self, form: StoredForm, query: LayerQuery | None = None) -> Answer:
        """The answer about a module.

        Args:
            form: its tensors by canonical suffix; none while planning.
            query: knows the class of the layer; None without an engine, when it may be of any class.

        Raises:
            LayerResolutionError: if it is quantised, and ignored or in no group.
            LoadError: if what is stored fits none of its groups.

        """
        classes = self._classes if query is None else _classes_of(form.module, query.layer_class)
        ignored = self.matcher.ignored(form.module, () if query is None else classes)
        found = [] if ignored is not None else self.matcher.groups(form.module, classes)
        quantised = is_quantised(form) if form else bool(found)
        if quantised and ignored is None and not found and "Linear" not in classes:
            # Without the model's code (model_free_ptq), every weight of two dimensions is called Linear.
            found = self.matcher.groups(form.module, ("Linear",))
        if ignored is not None:
            if quantised:
                raise self._contradiction(form, f"it matches {ignored!r} in {self.section.key('ignore')}")
            return self._float(form, self.section.key("ignore"), ignored, f"ignored by {ignored!r}")
        if not found:
            if quantised:
                raise self._contradiction(form, "it matches no target of any group")
            return self._float(form, self.section.key("config_groups"), "no target", "no target matches")
        if not quantised:
            key, (_, target) = self._key(found[0].group), found[0]
            return self._float(form, key, target, f"its weight is float, though {target!r} matches", found[0].group)
        return self._fitting(form, found)

    def _key(self, group: str) -> str:
        return self.section.key("config_groups", group)

    def _float(self, form: StoredForm, key: str, value: str, reason: str, group: str | None = None) -> Answer:
        return Answer(None, form, Evidence("config.json", key, value), reason, group)

    def _fitting(self, form: StoredForm, matches: Sequence[Match]) -> Answer:
        """The first group whose arguments are those of the stored tensors."""
        problems: dict[str, QuantError] = {}
        for group, target in matches:
            if group in problems:
                continue
            evidence = Evidence("config.json", self._key(group), target)
            kind = self._kind(group, form, evidence)
            if isinstance(kind, QuantError):
                problems[group] = kind
                continue
            alike = kind.form
            said = replace(form, weight=alike.weight, input=alike.input, spelling=alike.spelling)
            return Answer(kind.quant_type, said, evidence, f"{group}, by {target!r}", group)
        if len(problems) == 1:
            raise next(iter(problems.values()))
        raise LoadError(
            f"{form.module} matches {len(problems)} groups, and what is stored fits none of them",
            where="; ".join(self._key(group) for group in problems),
            found="; ".join(f"{group}: {_in_short(error)}" for group, error in problems.items()),
            todo="check that config.json and weights belong together",
            layer=form.module,
        )

    def _kind(self, group: str, form: StoredForm, evidence: Evidence) -> "_Kind | QuantError":
        """What modules of a group with such tensors are, or why they cannot be served: found out once."""
        alike = (group, frozenset((suffix, t.shape, t.dtype) for suffix, t in form.tensors.items()))
        if alike not in self._alike:
            name = self._type(group)
            try:
                self._alike[alike] = self._judged(name, group, form, evidence) if isinstance(name, str) else name
            except QuantError as error:
                self._alike[alike] = _completed(error, f"config.json: {evidence.key}", form)
        return self._alike[alike]

    def _type(self, group: str) -> str | QuantError:
        """The type of a group, or why there is none."""
        if group not in self._types:
            scheme = self.section.groups[group]
            try:
                self._types[group] = quant_type(scheme.weights, scheme.input_activations)
            except QuantError as error:
                self._types[group] = _completed(error, f"config.json: {self._key(group)}")
        return self._types[group]

    def _judged(self, name: str, group: str, form: StoredForm, evidence: Evidence) -> "_Kind":
        """A module as its group states it, if it can be served.

        Raises:
            QuantError: why it cannot.

        """
        if is_float_weight(form):
            raise LoadError(
                f"{form.module} is stored in float beside the scales of its quantisation",
                where=f"config.json: {evidence.key}",
                found=listing(_described(form)),
                expected="a weight of codes: what was computed cannot be told from a float one",
                todo="save the model compressed (llm-compressor: save_pretrained(..., save_compressed=True))",
                layer=form.module,
            )
        said = stated(form, self.section.groups[group], self.section.format)
        if form:
            create_scheme(LayerQuery(form.module), LayerQuant(name, (form.module,), (said,), (evidence,)))
        return _Kind(name, said)

    def _contradiction(self, form: StoredForm, why: str) -> LayerResolutionError:
        return LayerResolutionError(
            f"{form.module} is stored quantised, but {why}",
            where=f"config.json: {self.section.place}",
            found=listing(_described(form)),
            expected="a float weight, or a group whose targets name the module",
            todo="take config.json and weights from one run of the tool",
            layer=form.module,
        )


@dataclass(frozen=True)
class _Kind:
    """What modules with such tensors are: of one type, and stored as one of them is stated."""

    quant_type: str
    form: StoredForm


def _described(form: StoredForm) -> list[str]:
    return [f"{t.name} ({str(t.dtype).removeprefix('torch.')} in {t.file})" for t in form.tensors.values()]


def _completed(error: QuantError, where: str, form: StoredForm | None = None) -> QuantError:
    """An error of a scheme, which knows neither config.json nor what a recipe could say instead."""
    todo = "check that config.json and weights belong together; otherwise quantise the model again"
    if isinstance(error, UnsupportedSchemeError):
        todo = "quantise the model to one of the combinations in the README of quant-compressed-tensors"
    if form is not None and form.has("weight_g_idx"):
        todo = "quantise with `actorder: weight` (static), after which the groups are neighbours again"
    module = None if form is None else form.module
    findings = [
        replace(finding, where=finding.where or where, todo=finding.todo or todo, layer=finding.layer or module)
        for finding in error.findings
    ]
    try:
        raise_findings(findings)
    except QuantError as complete:
        return complete
    return error


def _in_short(error: QuantError) -> str:
    first = error.findings[0]
    return first.what if first.found is None else f"{first.what} ({first.found})"


def _classes_of(module: str, layer_class: str) -> tuple[str, ...]:
    """The classes of a layer in the words of configs, the most special one first.

    A head is a linear layer, and `lm_head` also where it shares the module of the embeddings.
    """
    if layer_class == "Embedding":
        return ("Embedding",)
    special = {"lm_head": ("lm_head",)}.get(layer_class, ())
    return (*special, *([EXPERTS] if is_expert(module) else []), "Linear")


def is_expert(module: str) -> bool:
    """Whether a module is a projection of a routed expert, by its name."""
    components = module.split(".")
    return any(here == "experts" and after.isdigit() for here, after in itertools.pairwise(components))
