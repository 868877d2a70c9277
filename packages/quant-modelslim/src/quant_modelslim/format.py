"""The ModelSlim format."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import ClassVar, Self

from quant_core import (
    CheckpointFolder,
    Detection,
    Evidence,
    Finding,
    LayerQuant,
    LayerQuery,
    QuantError,
    QuantFormat,
    StoredForm,
    raise_findings,
)
from quant_core.names import ModuleNames
from quant_modelslim.caches import quantised_caches
from quant_modelslim.description import NAME, PATTERN, WEIGHTS, Description
from quant_modelslim.resolve import agreed_type, module_type, unknown
from quant_modelslim.stating import canonical_suffixes, stated
from quant_modelslim.type_names import FLOAT
from quant_modelslim.validate import examine
from quant_modelslim.wrapped_norms import is_wrapped_norm


class ModelSlimFormat(QuantFormat):
    """A folder that msModelSlim wrote, recognised by the names of its files.

    Attributes:
        description: the parsed description.

    """

    name: ClassVar[str] = NAME
    vllm_name: ClassVar[str] = "ascend"

    def __init__(self, folder: CheckpointFolder, description: Description) -> None:
        super().__init__(folder)
        self.description = description
        self._alike: dict[tuple[object, ...], StoredForm] = {}

    @classmethod
    def detect(cls, folder: CheckpointFolder) -> Detection | None:
        """Whether the folder has a description file, or at least weights that lack one."""
        files = folder.files(PATTERN) or folder.files(WEIGHTS)
        return Detection(cls.name, f"{folder.path} has {' and '.join(files)}") if files else None

    @classmethod
    def load(cls, folder: CheckpointFolder) -> Self:
        """Read the description and compare it with the files.

        Raises:
            CheckpointError: if a file is wrong, or the description and the files contradict each other.
            UnsupportedSchemeError: if a type is not registered.
            LoadError: if the tensors of a module are not those of its type.

        """
        description = Description.read(folder)
        raise_findings(examine(folder, description))
        return cls(folder, description)

    @classmethod
    def findings(cls, folder: CheckpointFolder) -> Iterator[Finding]:
        """See QuantFormat.findings."""
        try:
            description = Description.read(folder)
            yield from examine(folder, description)
        except QuantError as error:
            yield from error.findings

    def layer_quant(self, query: LayerQuery) -> LayerQuant:
        """The type of the modules that the layer stands for, which must agree.

        Raises:
            UnknownLayerError: if the checkpoint has none of them.
            LayerResolutionError: if they disagree or are only partly there.

        """
        modules = query.modules or self._names.find(query.name, query.packed_modules) or self._described(query)
        types: dict[str, str] = {}  # one module may stand for several members
        evidence: list[Evidence] = []
        for module in modules:
            known = module_type(self.description, self.folder, module) if module not in types else None
            if known is not None:
                types[module] = known[0]
                evidence.append(known[1])
        absent = [module for module in modules if module not in types]
        if absent:
            raise unknown(query.name, absent, self.description, self.folder)
        quant_type = agreed_type(types, query.name)
        if quant_type == FLOAT:
            return LayerQuant(None, modules, evidence=tuple(evidence), reason=str(evidence[0]))
        forms = tuple(self._stated(form, quant_type, query) for form in self.stored_forms(modules))
        return LayerQuant(quant_type, modules, forms, tuple(evidence))

    def _stated(self, form: StoredForm, quant_type: str, query: LayerQuery) -> StoredForm:
        """A module with what is stated of it: found out once for all that are alike, since large models have many."""
        kind = (quant_type, query.sizes, *((suffix, tensor.shape) for suffix, tensor in form.tensors.items()))
        like = self._alike.get(kind)
        if like is None:
            like = self._alike[kind] = stated(form, quant_type, self.description, query)
        return StoredForm(form.module, form.tensors, like.weight, like.input, like.transforms, form.spelling)

    def canonical_suffixes(self, form: StoredForm) -> Mapping[str, str | None]:
        """Scales in two stages are called otherwise; what a wrapped norm stores a second time is left out."""
        if is_wrapped_norm(form, self.folder):
            return dict.fromkeys(form.tensors)
        return canonical_suffixes(form, self.description)

    @cached_property
    def caches(self) -> Mapping[str, LayerQuant]:
        """See caches.py."""
        return quantised_caches(self.description, self.folder)

    @property
    def rotation(self) -> str | None:
        """QuaRot's, which the tool folds into the layers that draft (MTP) as well, if they are in the folder."""
        keys = self.description.keys
        signs = {
            "metadata.quarot": keys.metadata and keys.metadata.quarot,
            "optional.quarot": keys.optional and keys.optional.quarot,
            "is_rot_used": keys.is_rot_used,
        }
        found = [name for name, sign in signs.items() if sign]
        return f"{self.description.file} has {' and '.join(found)}" if found else None

    def _described(self, query: LayerQuery) -> tuple[str, ...]:
        """The modules of a layer that no file holds: those under which it would be described."""
        parent, _, last = query.name.rpartition(".")
        members = tuple(f"{parent}.{member}" if parent else member for member in query.packed_modules.get(last, ()))
        return (query.name,) if not members or f"{query.name}.weight" in self.description.types else members

    @cached_property
    def _names(self) -> ModuleNames:
        return ModuleNames.renamed(self.folder.modules)
