"""The errors that a user of this project meets.

None of them is a `ValueError`: vLLM validates its configuration with pydantic, which wraps every ValueError into a
report that repeats all arguments and buries the cause. `LimitError` is the exception, because callers of a scheme
expect a ValueError for sizes that cannot work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

#: Findings that one message tells in full, and lines of one that was found in many places.
_IN_FULL = 10
_PLACES = 20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or odd, with a checkpoint.

    Attributes:
        what: one sentence that says what is wrong, with the name of the layer, tensor or file.
        where: file, key or layer at which it was noticed.
        found: what is there.
        expected: what should be there.
        todo: what the reader can do about it.
        also: further modules with which the same is wrong.
        file: the file's name, if it is about one.
        layer: the engine's layer or the checkpoint's module, if it is about one.
        tensor: the stored tensor's name, if it is about one.
        severity: an error keeps the checkpoint from being served, a warning does not; an info is nothing odd.
        error: the class of the error that it is raised as.

    """

    what: str
    where: str | None = None
    found: str | None = None
    expected: str | None = None
    todo: str | None = None
    also: tuple[str, ...] = ()
    file: str | None = None
    layer: str | None = None
    tensor: str | None = None
    severity: Literal["error", "warning", "info"] = "error"
    error: "type[QuantError] | None" = None

    def __str__(self) -> str:
        parts = {"where": self.where, "found": self.found, "expected": self.expected, "what to do": self.todo}
        lines = [self.what, *(f"  {name}: {text}" for name, text in parts.items() if text is not None)]
        if self.also:
            lines.append(f"  also: {listing(self.also)}")
        return "\n".join(lines)


class QuantError(Exception):
    """Base of all errors of this project.

    Args:
        what: one sentence that says what is wrong, with the name of the layer, tensor or file.
        where: file, key or layer at which it was noticed.
        found: what is there.
        expected: what should be there.
        todo: what the reader can do about it.
        about: further fields of the finding: `file`, `layer`, `tensor`, `also`.

    Attributes:
        findings: what is wrong, with its fields; the message is their text.

    """

    findings: tuple[Finding, ...]

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        todo: str | None = None,
        **about: Any,
    ) -> None:
        texts = {"where": where, "found": found, "expected": expected, "todo": todo}
        given: dict[str, Any] = {name: str(text) for name, text in texts.items() if text is not None}
        finding = Finding(what, error=type(self), **given, **about)
        self.findings = (finding,)
        super().__init__(_printable(str(finding)))

    def __reduce__(self) -> tuple[Any, ...]:
        # vLLM sends exceptions between processes by pickle.
        return _restored, (type(self), self.args, self.findings)


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise all errors among findings as one; nothing if there is none.

    It is of the first one's class. What was found in many places is told once.

    Raises:
        QuantError: carries the findings.

    """
    errors = tuple(finding for finding in findings if finding.severity == "error")
    if not errors:
        return
    texts = [str(finding) for finding in _merged(errors)]
    more = f"\nand {len(texts) - _IN_FULL} more of this kind" if len(texts) > _IN_FULL else ""
    message = _printable("\n".join(texts[:_IN_FULL]) + more)
    raise _restored(errors[0].error or QuantError, (message,), errors)


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Findings that differ in nothing but the place, as one."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.what, finding.where, finding.expected, finding.todo, finding.error)
        groups.setdefault(key, []).append(finding)
    merged = []
    for group in groups.values():
        first, places = group[0], [finding.found or "" for finding in group]
        if len(group) > 1:
            more = [f"and {len(places) - _PLACES} more"] if len(places) > _PLACES else []
            found = "\n    ".join([*places[:_PLACES], *more])
            first = replace(first, found=found)
        merged.append(first)
    return merged


def _restored(cls: type[QuantError], args: tuple[str, ...], findings: tuple[Finding, ...]) -> QuantError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    error.findings = findings
    return error


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
