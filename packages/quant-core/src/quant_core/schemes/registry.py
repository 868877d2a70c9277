"""Which class serves which (quantisation type, layer type)."""

import difflib
import functools
import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from quant_core.errors import RegistrationError, UnsupportedSchemeError, listing
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.caches import AscendAttentionScheme
from quant_core.schemes.experts import AscendMoEScheme

#: Entry-point group in which packages announce modules that register schemes.
ENTRY_POINT_GROUP = "quant_core.schemes"

LAYER_TYPES: dict[str, type[Scheme]] = {
    "linear": AscendLinearScheme,
    "moe": AscendMoEScheme,
    "attention": AscendAttentionScheme,
}

#: Letters of a name that are compared with others: the time that it takes grows with their square.
_LONGEST = 100

S = TypeVar("S", bound=Scheme)

logger = logging.getLogger(__name__)

_registry: dict[tuple[str, str], type[Scheme]] = {}

#: Names that classes of two packages claim: neither serves until one of them is gone.
_disputed: dict[tuple[str, str], RegistrationError] = {}

#: Not empty while packages are imported: whoever registers a class by hand is told by the error itself.
_loading: list[bool] = []


def register_scheme(quant_type: str, layer_type: str) -> Callable[[type[S]], type[S]]:
    """Class decorator: the class serves `quant_type` on layers of `layer_type` (linear, moe, attention).

    May be stacked to register aliases. Registering the same class again changes nothing.

    Raises:
        RegistrationError: for an unknown layer type, a class with another base than the layer type's, or a name that
            another class holds.

    """
    if layer_type not in LAYER_TYPES:
        raise RegistrationError(
            f"scheme {quant_type!r}: unknown layer type {layer_type!r}", expected=listing(LAYER_TYPES)
        )

    def register(cls: type[S]) -> type[S]:
        base = LAYER_TYPES[layer_type]
        if not _is_subclass(cls, base):
            raise RegistrationError(
                f"{origin(cls)} cannot serve {quant_type!r} on {layer_type} layers",
                found=f"bases {listing(b.__name__ for b in getattr(cls, '__mro__', ())[1:])}",
                expected=f"a subclass of quant_core.{base.__name__}",
            )
        holder = _registry.get((quant_type, layer_type), cls)
        if holder is not cls:
            error = RegistrationError(
                f"two schemes claim {quant_type!r} on {layer_type} layers",
                found=f"{origin(holder)} and {origin(cls)}",
                todo="register one of them under another name, or uninstall its package",
            )
            if _loading:
                _disputed[quant_type, layer_type] = error
            raise error
        if getattr(cls, "stores", cls) is None and cls.get_weight is AscendLinearScheme.get_weight:  # type: ignore[attr-defined]
            raise RegistrationError(
                f"{origin(cls)} does not say what {quant_type!r} stores",
                expected="`stores`, or a get_weight of its own",
            )
        if layer_type == "moe" and not hasattr(cls, "linear"):
            raise RegistrationError(
                f"{origin(cls)} does not say what {quant_type!r} stores for a projection of an expert",
                expected="`linear`, the scheme of a linear layer that stores the same",
            )
        _registry[quant_type, layer_type] = cls
        return cls

    return register


def get_scheme_class(quant_type: str, layer_type: str) -> type[Scheme] | None:
    """The class that serves `quant_type` on `layer_type`, or None.

    Raises:
        RegistrationError: if two packages claim the type.

    """
    _load_all()
    if (quant_type, layer_type) in _disputed:
        raise _disputed[quant_type, layer_type]
    return _registry.get((quant_type, layer_type))


def require_scheme_class(quant_type: str, layer_type: str, where: object = None) -> type[Scheme]:
    """As `get_scheme_class`, but an unknown type is an error that says what exists.

    Raises:
        UnsupportedSchemeError: names the type, the types that exist for the layer type and the nearest of them.

    """
    found = get_scheme_class(quant_type, layer_type)
    if found is not None:
        return found
    types = sorted(t for t, kind in _registry if kind == layer_type)
    elsewhere = sorted(kind for t, kind in _registry if t == quant_type)
    near = difflib.get_close_matches(quant_type[:_LONGEST], types, n=1)
    hints = [f"the nearest name is {near[0]!r}"] if near else []
    hints += [f"{quant_type!r} exists for {listing(elsewhere)} layers"] if elsewhere else []
    hints.append(f"a package can add it in the entry-point group {ENTRY_POINT_GROUP!r}")
    hints += [str(fault) for fault in _load_all()]
    raise UnsupportedSchemeError(
        f"no scheme serves the quantisation type {quant_type!r} on {layer_type} layers",
        where=where,
        expected=f"one of {listing(types, 40)}" if types else f"there is no scheme for {layer_type} layers yet",
        todo="; ".join(hints),
    )


def list_schemes() -> dict[tuple[str, str], type[Scheme]]:
    """All registered schemes by (quantisation type, layer type), sorted."""
    _load_all()
    return dict(sorted(_registry.items()))


def origin(cls: object) -> str:
    """A class's full name, for messages."""
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"


def load_announced(entry: EntryPoint) -> Any:
    """What an entry point of another package stands for.

    Raises:
        RegistrationError: if it cannot be imported, whatever the reason, naming the package.

    """
    try:
        return entry.load()
    except RegistrationError:
        raise
    except Exception as error:
        owner = entry.dist.name if entry.dist else "an unknown distribution"
        raise RegistrationError(
            f"what {owner} announces cannot be imported: {error}",
            where=f"entry point {entry.name!r} = {entry.value!r} in group {entry.group!r}",
            todo=f"repair or uninstall {owner}",
        ) from error


@functools.cache
def _load_all() -> tuple[RegistrationError, ...]:
    """Import the built-in schemes, then what other packages announce; what is wrong with the latter.

    A fault of a package must not stop models that have nothing to do with it: it is told once, as a warning, and again
    by whoever looks a type up that may be meant.
    """
    for layer_type in LAYER_TYPES:
        package = importlib.import_module(f"quant_core.schemes.{layer_type}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    faults = []
    _loading.append(True)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            load_announced(entry)
        except RegistrationError as error:
            faults.append(error)
            logger.warning("%s", error)
            # Python forgets a module whose import failed, and so does the registry.
            for key in [key for key, cls in _registry.items() if cls.__module__ not in sys.modules]:
                del _registry[key]
    _loading.clear()
    return tuple(faults)


def _is_subclass(cls: object, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)
