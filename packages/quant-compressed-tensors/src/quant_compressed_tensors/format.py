"""The compressed-tensors format."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import ClassVar, Self

from quant_compressed_tensors.caches import OWNED_BY_CACHES, quantised_caches
from quant_compressed_tensors.resolve import Answer, Resolver
from quant_compressed_tensors.section import NAME, Section, find_section
from quant_compressed_tensors.stating import SUFFIXES
from quant_compressed_tensors.validate import examine, oddities
from quant_core import (
    CheckpointFolder,
    Detection,
    Finding,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    QuantError,
    QuantFormat,
    StoredForm,
    UnknownLayerError,
    raise_findings,
)
from quant_core.errors import listing
from quant_core.names import ModuleNames


class CompressedTensorsFormat(QuantFormat):
    """A folder whose config.json names the method, as llm-compressor writes it.

    Attributes:
        section: what config.json says.

    """

    name: ClassVar[str] = NAME
    vllm_name: ClassVar[str] = NAME

    def __init__(self, folder: CheckpointFolder, section: Section) -> None:
        super().__init__(folder)
        self.section = section

    @classmethod
    def detect(cls, folder: CheckpointFolder) -> Detection | None:
        """Whether config.json has a section that names the method."""
        found = find_section(folder)
        return found and Detection(cls.name, f"{folder.path} has {found[0]} in config.json, for {NAME}")

    @classmethod
    def load(cls, folder: CheckpointFolder) -> Self:
        """Read the section and compare it with the files.

        Raises:
            CheckpointError: if config.json or a weights file is wrong.
            UnsupportedSchemeError: if something is asked for that is not served.
            LayerResolutionError: if quantised modules belong to no group, or are ignored.
            LoadError: if the tensors of a module are not those of its group.

        """
        found = cls(folder, Section.read(folder))
        raise_findings(examine(folder, found.section, found.resolver, found.modules))
        return found

    @classmethod
    def findings(cls, folder: CheckpointFolder) -> Iterator[Finding]:
        """See QuantFormat.findings."""
        try:
            found = cls(folder, Section.read(folder))
            yield from examine(folder, found.section, found.resolver, found.modules)
            yield from oddities(folder, found.section, found.resolver, found.modules, {})
        except QuantError as error:
            yield from error.findings

    @cached_property
    def resolver(self) -> Resolver:
        """Says of each module which group it belongs to."""
        return Resolver(self.section)

    def canonical_suffixes(self, form: StoredForm) -> Mapping[str, str | None]:
        """See stating.py."""
        own = {suffix: canonical for suffix, canonical in SUFFIXES.items() if suffix in form.tensors}
        if self.section.cache is None:
            return own
        return own | dict.fromkeys(OWNED_BY_CACHES.intersection(form.tensors))

    def layer_quant(self, query: LayerQuery) -> LayerQuant:
        """The type of the modules that the layer stands for, which must agree.

        Raises:
            UnknownLayerError: if the checkpoint has none of them.
            LayerResolutionError: if they disagree or are only partly there, or a module fits no group.

        """
        modules = query.modules or self._names.find(query.name, query.packed_modules) or (query.name,)
        known = self.modules
        absent = [module for module in modules if module not in known]
        if absent and known:
            raise UnknownLayerError(
                f"{query.name}: the weight files do not know this layer",
                where=self.folder.path,
                expected=f"tensors of {listing(absent)}",
                todo="check that config.json describes the model that was quantised",
            )
        answers = {module: self.resolver.of(known.get(module, StoredForm(module)), query) for module in modules}
        return _agreed(query.name, modules, answers)

    @cached_property
    def caches(self) -> Mapping[str, LayerQuant]:
        """See caches.py."""
        return quantised_caches(self.section, self.folder)

    def review(self, decisions: Mapping[str, LayerQuant]) -> Iterable[Finding]:
        """Targets and entries of `ignore` that match nothing, and what is float although a target matches it."""
        return oddities(self.folder, self.section, self.resolver, self.modules, decisions)

    @cached_property
    def _names(self) -> ModuleNames:
        return ModuleNames.renamed(self.modules)


def _agreed(layer: str, modules: tuple[str, ...], answers: Mapping[str, Answer]) -> LayerQuant:
    """The one answer for all members of a layer.

    Raises:
        LayerResolutionError: names what is said of each member.

    """
    types = dict.fromkeys(answer.quant_type for answer in answers.values())
    if len(types) > 1:
        raise LayerResolutionError(
            f"{layer}: the members of this layer are quantised differently",
            found=listing(
                f"{module} is {answer.quant_type or 'float'} ({answer.reason})" for module, answer in answers.items()
            ),
            expected="one type for all of them, since they are multiplied at once",
            todo="quantise the members alike, or name all of them in `ignore`",
            layer=layer,
        )
    first = answers[modules[0]]
    evidence = tuple(answers[module].evidence for module in modules)
    if first.quant_type is None:
        return LayerQuant(None, modules, evidence=evidence, reason=first.reason)
    return LayerQuant(first.quant_type, modules, tuple(answers[module].form for module in modules), evidence)
