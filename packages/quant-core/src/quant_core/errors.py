"""The errors that a user of this project meets.

None of them is a `ValueError`: vLLM validates its configuration with pydantic, which wraps every ValueError into a
report that repeats all arguments and buries the cause. `LimitError` is the exception, because callers of a scheme
expect a ValueError for sizes that cannot work.
"""

from collections.abc import Iterable


class QuantError(Exception):
    """Base of all errors of this project.

    Args:
        what: one sentence that says what is wrong, with the name of the layer, tensor or file.
        where: file, key or layer at which it was noticed.
        found: what is there.
        expected: what should be there.
        todo: what the reader can do about it.

    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        todo: str | None = None,
    ) -> None:
        parts = {"where": where, "found": found, "expected": expected, "what to do": todo}
        # One argument, already formatted: vLLM sends exceptions between processes by pickle, which calls cls(*args).
        lines = [what, *(f"  {name}: {text}" for name, text in parts.items() if text is not None)]
        super().__init__(_printable("\n".join(lines)))


class CheckpointError(QuantError):
    """The files of a checkpoint are wrong: absent, damaged, contradictory or unsafe."""


class UnsupportedSchemeError(QuantError):
    """A quantisation type for which no scheme is registered, or which a scheme cannot serve in this form."""


class LayerResolutionError(QuantError):
    """It cannot be decided how a layer is quantised."""


class UnknownLayerError(LayerResolutionError):
    """Nothing in the checkpoint belongs to a layer."""


class LimitError(QuantError, ValueError):
    """A device, size or parallel layout that a scheme cannot serve."""


class LoadError(QuantError):
    """A tensor that is absent, of another shape or dtype than declared, unusable, or was never loaded."""


class RegistrationError(QuantError):
    """Two schemes or formats claim one name, or a class does not fit what it is registered for."""


def listing(items: Iterable[object], limit: int = 8) -> str:
    """`items` as a comma-separated text that stays readable: at most `limit` of them."""
    texts = [str(item) for item in items]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _printable(text: str) -> str:
    """Names come from files: control characters and lone surrogates, which no terminal can show, become escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
