"""What a checkpoint format must answer, and how formats are found.

A complete format, in a package of its own that announces it in the entry-point group `quant_core.formats`:

    from quant_core import Detection, Evidence, LayerQuant, QuantFormat

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
            evidence = Evidence("config.json", "everything_int8", "true")
            return LayerQuant("W8A8_DYNAMIC", modules, self.stored_forms(modules), (evidence,))
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import ClassVar, Self

from quant_core.checkpoint import CheckpointFolder
from quant_core.errors import LimitError, LoadError, RegistrationError, UnsupportedSchemeError
from quant_core.queries import Detection, Evidence, LayerQuant, LayerQuery
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.composed import compose, reasons_against
from quant_core.schemes.context import LayerContext, Shard, StoredForm
from quant_core.schemes.registry import load_announced, origin, require_scheme_class
from quant_core.schemes.verify import verify_stored

__all__ = [
    "ENTRY_POINT_GROUP",
    "Detection",
    "Evidence",
    "LayerQuant",
    "LayerQuery",
    "QuantFormat",
    "detect_formats",
    "layer_context",
    "list_formats",
]

#: Entry-point group in which packages announce QuantFormat classes.
ENTRY_POINT_GROUP = "quant_core.formats"

_ONE_TOO_MANY = "uninstall the package of one of them"


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

    @abstractmethod
    def layer_quant(self, query: LayerQuery) -> LayerQuant:
        """How one layer is quantised.

        Raises:
            UnknownLayerError: if nothing in the checkpoint belongs to the layer.
            LayerResolutionError: if the checkpoint contradicts itself about it.

        """

    def stored_forms(self, modules: Sequence[str]) -> tuple[StoredForm, ...]:
        """What the files hold for each module."""
        known = self.folder.modules
        return tuple(known[module] if module in known else StoredForm(module) for module in modules)

    def create_scheme_for_layer(self, query: LayerQuery) -> Scheme | None:
        """The scheme that serves a layer, checked against limits and files; None for a float layer.

        Raises:
            UnsupportedSchemeError: if no scheme is registered for the type, or it cannot serve this form of it.
            LoadError: if the files do not hold what the scheme loads.
            LayerResolutionError: as `layer_quant`.

        """
        quant = self.layer_quant(query)
        return None if quant.quant_type is None else self.create_scheme(query, quant)

    def create_scheme(self, query: LayerQuery, quant: LayerQuant) -> Scheme:
        """The scheme for an answer that `layer_quant` gave; raises as `create_scheme_for_layer`."""
        assert quant.quant_type is not None
        where = "; ".join(str(evidence) for evidence in quant.evidence[:3])
        scheme_class = require_scheme_class(quant.quant_type, query.layer_type, where=f"{query.name} ({where})")
        context = layer_context(query, quant, scheme_class)
        reasons = reasons_against(scheme_class, context)
        if reasons:
            raise UnsupportedSchemeError(
                f"{query.name}: the type {quant.quant_type} cannot be served here",
                where=where,
                found="; ".join(reasons),
            )
        scheme = compose(scheme_class, context)
        if isinstance(scheme, AscendLinearScheme):
            verify_stored(scheme)
        return scheme


def layer_context(query: LayerQuery, quant: LayerQuant, scheme_class: type[Scheme]) -> LayerContext:
    """The scheme's view of a layer. Sizes that the engine did not give are read off the stored shapes.

    Raises:
        LoadError: if neither tells the sizes.
        LimitError: if the engine has more or fewer members than the checkpoint.

    """
    modules, stored, sizes = list(quant.modules), list(quant.stored), list(query.output_sizes)
    input_size = query.input_size
    if input_size is None or not sizes:
        told = [_sizes(scheme_class, form) for form in stored or (StoredForm(query.name),)]
        input_size = told[0][0] if input_size is None else input_size
        sizes = sizes or [output for _, output in told]
    if len(modules) == 1 and len(sizes) > 1:  # fused in the checkpoint already
        modules, stored = modules * len(sizes), stored * len(sizes)
    local = list(query.local_output_sizes) or sizes
    if not len(modules) == len(sizes) == len(local):
        raise LimitError(
            f"{query.name}: the engine fuses {len(sizes)} members ({len(local)} on this rank), the checkpoint has "
            f"{len(modules)}",
            found=", ".join(modules),
        )
    return LayerContext(
        name=query.name,
        layer_type=query.layer_type,
        shards=tuple(Shard(*member) for member in zip(modules, sizes, local, strict=True)),
        input_size=input_size,
        params_dtype=query.params_dtype,
        stored=tuple(stored),
        partition=query.partition,
        has_bias=query.has_bias,
        role=query.role,
    )


def _sizes(scheme_class: type[Scheme], form: StoredForm) -> tuple[int, int]:
    sizes = scheme_class.stored_sizes(form) if issubclass(scheme_class, AscendLinearScheme) else None
    if sizes is None:
        raise LoadError(
            f"{form.module}: the stored tensors do not tell the layer's sizes",
            found=", ".join(f"{t.name} {list(t.shape)}" for t in form.tensors.values()) or "no tensor of this name",
        )
    return sizes


def list_formats() -> dict[str, type[QuantFormat]]:
    """The installed formats by name.

    Raises:
        RegistrationError: if a package announces something that is no format or cannot be imported, or two announce
            one name or one method of vLLM.

    """
    formats: dict[str, type[QuantFormat]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found = load_announced(entry)
        named = hasattr(found, "name") and hasattr(found, "vllm_name")
        if not (isinstance(found, type) and issubclass(found, QuantFormat) and named):
            raise RegistrationError(
                f"entry point {entry.name!r} = {entry.value!r} is not a QuantFormat with a name and a vllm_name",
                found=found,
            )
        formats.setdefault(found.name, found)
        for other in formats.values():
            if other is found:
                continue
            both = f"{origin(other)} and {origin(found)}"
            if other.name == found.name:
                raise RegistrationError(f"two formats are called {found.name!r}", found=both, todo=_ONE_TOO_MANY)
            if other.vllm_name == found.vllm_name:
                method = found.vllm_name
                raise RegistrationError(f"two formats claim vLLM's method {method!r}", found=both, todo=_ONE_TOO_MANY)
    return dict(sorted(formats.items()))


def detect_formats(folder: CheckpointFolder) -> list[Detection]:
    """Every installed format that recognises the folder."""
    found = (quant_format.detect(folder) for quant_format in list_formats().values())
    return [detection for detection in found if detection is not None]
