"""The text of a report, made from its data."""

import textwrap
from typing import Any

from vllm_ascend_quant.reporting.collecting import Part

_WIDTH = 150


def of_part(part: Part) -> str:
    """One part as text, with its heading."""
    body = f"ERROR: {part.error}" if part.error else "\n".join(_lines(part.found)) or "none"
    said = "\n".join(["printed meanwhile:", *(f"| {line}" for line in part.said.splitlines())]) if part.said else ""
    return f"== {part.title} ==\n" + textwrap.indent("\n".join(filter(None, [body, said])), "  ") + "\n"


def _lines(value: Any) -> list[str]:
    """A value in lines: mappings as `key: value`, what is below them indented."""
    if isinstance(value, dict):
        return [line for key, below in value.items() for line in _entry(str(key), below)]
    if isinstance(value, list):
        return [line for below in value for line in _listed(below)]
    return _scalar(value).splitlines()


def _entry(key: str, value: Any) -> list[str]:
    one = _in_one_line(value)
    if one is not None:
        return textwrap.wrap(
            f"{key}: {one}", _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return [f"{key}:", *(f"  {line}" for line in _lines(value))]


def _listed(value: Any) -> list[str]:
    first, *others = _lines(value) or ["none"]
    return [f"- {first}", *(f"  {line}" for line in others)]


def _in_one_line(value: Any) -> str | None:
    """What fits behind its key; None for what takes lines of its own."""
    if isinstance(value, list):
        parts = [_in_one_line(part) for part in value if not isinstance(part, (dict, list))]
        short = len(parts) == len(value) and all(part is not None and len(part) < 60 for part in parts)
        return (", ".join(map(str, parts)) or "none") if short else None
    if isinstance(value, dict):
        return None if value else "none"
    text = _scalar(value)
    return None if "\n" in text else text


def _scalar(value: Any) -> str:
    if value is None:
        return "not found"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
