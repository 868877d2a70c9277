"""From a module to its group: by the section, and where that is silent or ambiguous by what the files hold."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from quant_compressed_tensors.combinations import quant_type
from quant_compressed_tensors.matching import Match, Matcher
from quant_compressed_tensors.section import Section
from quant_compressed_tensors.stating import is_quantised, stated
from quant_core import (
    Evidence,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LoadError,
    QuantError,
    StoredForm,
    create_scheme,
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
        self._judged: dict[tuple[object, ...], QuantError | None] = {}
        self._classes = sorted({target for targets in served.values() for target in targets})

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
        found = self.matcher.groups(form.module, classes)
        first = found[0].group if found else None
        ignored = self.matcher.ignored(form.module, () if query is None else classes)
        quantised = is_quantised(form) if form else ignored is None and bool(found)
        if ignored is not None:
            if quantised:
                raise self._contradiction(form, f"it matches {ignored!r} in {self.section.key('ignore')}")
            return self._float(form, self.section.key("ignore"), ignored, f"ignored by {ignored!r}")
        if not found:
            if quantised:
                raise self._contradiction(form, "it matches no target of any group")
            return self._float(form, self.section.key("config_groups"), "no target", "no target matches")
        if not quantised:
            key, (_, target) = self.section.key("config_groups", found[0].group), found[0]
            return self._float(form, key, target, f"its weight is float, though {target!r} matches", first)
        return self._fitting(form, found)

    def _float(self, form: StoredForm, key: str, value: str, reason: str, group: str | None = None) -> Answer:
        return Answer(None, form, Evidence("config.json", key, value), reason, group)

    def _fitting(self, form: StoredForm, matches: Sequence[Match]) -> Answer:
        """The first group whose arguments are those of the stored tensors."""
        problems: dict[str, QuantError] = {}
        for group, target in matches:
            if group in problems:
                continue
            scheme = self.section.groups[group]
            try:
                name = quant_type(scheme.weights, scheme.input_activations)
                said = stated(form, scheme, self.section.format)
                self._judge(name, said)
            except QuantError as error:
                problems[group] = error
                continue
            evidence = Evidence("config.json", self.section.key("config_groups", group), target)
            return Answer(name, said, evidence, f"{group}, by {target!r}", group)
        if len(problems) == 1:
            raise next(iter(problems.values()))
        raise LoadError(
            f"{form.module} matches {len(problems)} groups, and what is stored fits none of them",
            where="; ".join(self.section.key("config_groups", group) for group in problems),
            found="; ".join(f"{group}: {_in_short(error)}" for group, error in problems.items()),
            todo="check that config.json and weights belong together",
            layer=form.module,
        )

    def _judge(self, name: str, form: StoredForm) -> None:
        """Make sure that a module can be served as one of this type: once for all that are alike.

        Raises:
            QuantError: why it cannot.

        """
        if not form:
            return
        kind = (name, form.weight, form.input, frozenset((s, t.shape, t.dtype) for s, t in form.tensors.items()))
        if kind not in self._judged:
            self._judged[kind] = None
            try:
                create_scheme(LayerQuery(form.module), LayerQuant(name, (form.module,), (form,)))
            except QuantError as error:
                self._judged[kind] = error
        if (known := self._judged[kind]) is not None:
            raise known

    def _contradiction(self, form: StoredForm, why: str) -> LayerResolutionError:
        tensors = [f"{t.name} ({str(t.dtype).removeprefix('torch.')} in {t.file})" for t in form.tensors.values()]
        return LayerResolutionError(
            f"{form.module} is stored quantised, but {why}",
            where=f"config.json: {self.section.place}",
            found=listing(tensors),
            expected="a float weight, or a group whose targets name the module",
            todo="take config.json and weights from one run of the tool",
            layer=form.module,
        )


def _in_short(error: QuantError) -> str:
    first = error.findings[0]
    return first.what if first.found is None else f"{first.what} ({first.found})"


def _classes_of(module: str, layer_class: str) -> tuple[str, ...]:
    """The classes of a layer in the words of configs, the most special one first; a head is a linear layer."""
    usual = "Embedding" if layer_class == "Embedding" else "Linear"
    return (EXPERTS, usual) if is_expert(module) else (usual,)


def is_expert(module: str) -> bool:
    """Whether a module is a projection of a routed expert, by its name."""
    components = module.split(".")
    return any(here == "experts" and after.isdigit() for here, after in itertools.pairwise(components))
