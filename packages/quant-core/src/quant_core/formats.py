"""What a checkpoint format must answer, and how formats are found.

A complete format, in a package of its own that announces it in the entry-point group `quant_core.formats`:

    from dataclasses import replace

    from quant_core import Detection, Evidence, LayerQuant, QuantFormat, WeightForm

    class EverythingInt8(QuantFormat):
        name = "everything-int8"
        vllm_name = "everything-int8"

        @classmethod
        def detect(cls, folder):
            marked = folder.config.get("everything_int8")
            return Detection(cls.name, "config.json says everything_int8") if marked else None

        @classmethod
        def load(cls, folder):
            return cls(folder)

        def layer_quant(self, query):
            modules = query.modules or (query.name,)
            int8 = WeightForm(num_bits=8, strategy="channel")
            stored = tuple(replace(form, weight=int8) for form in self.stored_forms(modules))
            evidence = Evidence("config.json", "everything_int8", "true")
            return LayerQuant("W8A8_DYNAMIC", modules, stored, (evidence,))
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, Self

from quant_core.checkpoint import CheckpointFolder
from quant_core.errors import CheckpointError, Finding, QuantError, RegistrationError
from quant_core.expert_layers import experts_quant
from quant_core.judging import create_scheme
from quant_core.queries import Detection, Evidence, LayerQuant, LayerQuery
from quant_core.schemes.base import Scheme
from quant_core.schemes.registry import load_announced, origin
from quant_core.stored import StoredForm, StoredTensor

__all__ = [
    "ENTRY_POINT_GROUP",
    "Detection",
    "Evidence",
    "LayerQuant",
    "LayerQuery",
    "QuantFormat",
    "detect_formats",
    "disputed_formats",
    "list_formats",
]

#: Entry-point group in which packages announce QuantFormat classes.
ENTRY_POINT_GROUP = "quant_core.formats"

logger = logging.getLogger(__name__)


class QuantFormat(ABC):
    """One checkpoint format.

    Attributes:
        name: its name in messages and tools.
        vllm_name: the name under which vLLM knows it (`--quantization`).
        folder: the checkpoint.

    """

    name: ClassVar[str]
    vllm_name: ClassVar[str]

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder

    @classmethod
    @abstractmethod
    def detect(cls, folder: CheckpointFolder) -> Detection | None:
        """Whether the folder is in this format, and why. Cheap: file names and small JSON files only."""

    @classmethod
    @abstractmethod
    def load(cls, folder: CheckpointFolder) -> Self:
        """Read and validate everything that needs no engine.

        Raises:
            QuantError: with every problem that was found.

        """

    @classmethod
    def findings(cls, folder: CheckpointFolder) -> Iterable[Finding]:
        """Everything that is wrong or odd about a folder, without raising. What `load` raises is their text."""
        try:
            cls.load(folder)
        except QuantError as error:
            return error.findings
        return ()

    @abstractmethod
    def layer_quant(self, query: LayerQuery) -> LayerQuant:
        """How one layer is quantised. For a quantised one, states how each of its modules is stored.

        Raises:
            UnknownLayerError: if nothing in the checkpoint belongs to the layer.
            LayerResolutionError: if the checkpoint contradicts itself about it.

        """

    @cached_property
    def caches(self) -> Mapping[str, LayerQuant]:
        """The quantised key/value caches, by the checkpoint's attention module.

        The stored form of one has canonical suffixes (`k_scale`, `k_offset`, `v_scale`, `v_offset`), whatever module
        its tensors belong to by their names.

        Raises:
            LayerResolutionError: if the checkpoint claims a cache for which it holds nothing, or only a part.

        """
        return {}

    def experts_quant(self, query: LayerQuery) -> LayerQuant:
        """How the experts of one layer are quantised, by what `layer_quant` says of their projections.

        Raises:
            UnknownLayerError: if the checkpoint lacks projections.
            LayerResolutionError: if experts disagree, or only one half of them is quantised.

        """
        return experts_quant(self.layer_quant, query)

    def canonical_suffixes(self, form: StoredForm) -> Mapping[str, str | None]:
        """What the format calls otherwise: the canonical suffix of a module's tensors by the format's own one.

        None is for tensors that no layer needs. The one place where a format's spelling is known: it holds for the
        headers (`modules`) and for the tensors that an engine loads (`canonical_name`).

        Args:
            form: a module of the files under the format's own suffixes.

        """
        return {}

    @cached_property
    def modules(self) -> Mapping[str, StoredForm]:
        """The modules of the files, their tensors under canonical suffixes.

        Raises:
            CheckpointError: if two tensors of a module mean the same.

        """
        return {module: respelled(form, self.canonical_suffixes(form)) for module, form in self.folder.modules.items()}

    @cached_property
    def _renamed(self) -> Mapping[str, str | None]:
        """The names of tensors that have another canonical one."""
        return {
            tensor.name: None if canonical is None else f"{module}.{canonical}" if module else canonical
            for module, form in self.folder.modules.items()
            for suffix, canonical in self.canonical_suffixes(form).items()
            if (tensor := form.tensors.get(suffix)) is not None
        }

    def canonical_name(self, tensor: str) -> str | None:
        """The name under which a tensor of the files is loaded; None if no layer needs it."""
        return self._renamed.get(tensor, tensor)

    def stored_forms(self, modules: Sequence[str]) -> tuple[StoredForm, ...]:
        """What the files hold for each module."""
        known = self.modules
        return tuple(known[module] if module in known else StoredForm(module) for module in modules)

    def review(self, decisions: Mapping[str, LayerQuant]) -> Iterable[Finding]:
        """What is odd about a checkpoint once all layers of a model are decided, such as a target without a layer.

        Warnings rather than errors: a target model and its speculative draft may share a folder and are reviewed one by
        one, so what has no layer in one of them may have one in the other.

        Args:
            decisions: the answer about each layer, by the engine's name of it. Told once, after the model is built.

        """
        return ()

    @property
    def rotation(self) -> str | None:
        """What says that the hidden states are rotated against the float model's, for people; None if they are not.

        A rotation that is folded into the weights changes no logits. It is noticed by whoever reads hidden states in
        between, as the draft of a speculative decoding does.
        """
        return None

    def create_scheme_for_layer(self, query: LayerQuery) -> Scheme | None:
        """The scheme that serves a layer, checked against limits and files; None for a float layer.

        Raises:
            UnsupportedSchemeError: if no scheme is registered for the type, or it cannot serve this form of it.
            LoadError: if the files do not hold what the scheme loads.
            LayerResolutionError: as `layer_quant`.

        """
        quant = self.experts_quant(query) if query.layer_type == "moe" else self.layer_quant(query)
        return None if quant.quant_type is None else create_scheme(query, quant)


def respelled(form: StoredForm, suffixes: Mapping[str, str | None]) -> StoredForm:
    """A module with canonical suffixes.

    Raises:
        CheckpointError: if two of its tensors mean the same.

    """
    if not suffixes:
        return form
    tensors: dict[str, StoredTensor] = {}
    for suffix, tensor in form.tensors.items():
        canonical = suffixes.get(suffix, suffix)
        if canonical is None:
            continue
        other = tensors.setdefault(canonical, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"{form.module} stores the same twice: {other.name} and {tensor.name}",
                where=tensor.file,
                todo="keep one of them",
                tensor=tensor.name,
            )
    spelling = {canonical: suffix for suffix, canonical in suffixes.items() if canonical is not None}
    return StoredForm(form.module, tensors, spelling=spelling)


def list_formats() -> dict[str, type[QuantFormat]]:
    """The installed formats by name, without those that their packages announce in vain; see `disputed_formats`."""
    return dict(_announced()[0])


def disputed_formats() -> dict[str, RegistrationError]:
    """Formats that share a name or a method of vLLM with another, by name: none of them may open a checkpoint."""
    return dict(_announced()[1])


@functools.cache
def _announced() -> tuple[dict[str, type[QuantFormat]], dict[str, RegistrationError]]:
    """What packages announce: read once in a process, because engines ask for it at every layer.

    A fault of a package must not stop models that have nothing to do with it: it is told once, as a warning, and again
    when a checkpoint is opened that may be meant.
    """
    formats: dict[str, type[QuantFormat]] = {}
    disputed: dict[str, RegistrationError] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            found = _announced_class(entry)
        except RegistrationError as fault:
            logger.warning("%s", fault)
            continue
        for other in [other for other in formats.values() if other is not found]:
            same = "are called" if other.name == found.name else "claim vLLM's method"
            if other.name == found.name or other.vllm_name == found.vllm_name:
                error = RegistrationError(
                    f"two formats {same} {(found.name if other.name == found.name else found.vllm_name)!r}",
                    found=f"{origin(other)} and {origin(found)}",
                    todo="uninstall the package of one of them",
                )
                disputed |= {other.name: error, found.name: error}
                logger.warning("%s", error)
        formats.setdefault(found.name, found)
    return dict(sorted(formats.items())), disputed


def _announced_class(entry: EntryPoint) -> type[QuantFormat]:
    found = load_announced(entry)
    named = hasattr(found, "name") and hasattr(found, "vllm_name")
    if not (isinstance(found, type) and issubclass(found, QuantFormat) and named):
        raise RegistrationError(
            f"entry point {entry.name!r} = {entry.value!r} is not a QuantFormat with a name and a vllm_name",
            found=found,
            todo=f"repair or uninstall {entry.dist.name if entry.dist else 'the package'}",
        )
    return found


def detect_formats(folder: CheckpointFolder) -> list[Detection]:
    """Every installed format that recognises the folder.

    A format that fails to look at it does not: what it raises is told as a warning.

    Raises:
        RegistrationError: if one of them shares its name or method with another.

    """
    detections = []
    for name, quant_format in list_formats().items():
        try:
            found = quant_format.detect(folder)
        except QuantError as error:  # of a folder that is damaged, and perhaps nobody's: whoever opens it says so
            logger.info("%s cannot tell whether %s is in its format: %s", origin(quant_format), folder.path, error)
            continue
        except Exception as error:  # a stranger's code, which must not stop other models
            logger.warning("%s cannot tell whether %s is in its format: %r", origin(quant_format), folder.path, error)
            continue
        if found is not None:
            if name in disputed_formats():
                raise disputed_formats()[name]
            detections.append(found)
    return detections
