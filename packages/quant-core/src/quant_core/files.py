"""Reading one file of a checkpoint: JSON, or the header of a safetensors file.

The files come from strangers. Whatever is wrong with one becomes a `CheckpointError` that names it, and nothing that
could block or never end is opened.
"""

import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from quant_core.errors import CheckpointError, listing
from quant_core.stored import StoredTensor

#: What all JSON of a folder may hold together: bytes, and marks between values (commas, colons, opening brackets).
#: Parsing takes up to 140 bytes of memory for a mark, whatever `[]`, `{}` or `"":0` take on disk, so 2.3 GB in all.
#: DeepSeek-V3 with three tensors for each linear layer of its 14,848 experts has 45 MB and 2.1 million marks.
_MOST_BYTES = 2**28
_MOST_MARKS = 2**24

_MARKS = (b",", b":", b"[", b"{")
_AT_ONCE = 2**20

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class JsonSize(NamedTuple):
    """How much JSON a text holds: bytes, and marks, which bound the number of values and keys."""

    bytes: int = 0
    marks: int = 0


class JsonTotal:
    """The JSON that is parsed of one folder, files and headers of weights together, kept within bounds."""

    def __init__(self) -> None:
        self._sizes: dict[str, JsonSize] = {}
        self._total = JsonSize()

    def add(self, path: Path, name: str, size: JsonSize) -> None:
        """Count what is about to be parsed; a file that is read again counts once.

        Raises:
            CheckpointError: if it is more than any real checkpoint has.

        """
        before = self._sizes.get(name, JsonSize())
        self._sizes[name] = size
        self._total = JsonSize(*(t - b + s for t, b, s in zip(self._total, before, size, strict=True)))
        if self._total.bytes <= _MOST_BYTES and self._total.marks <= _MOST_MARKS:
            return
        rest = "" if self._total == size else f"; with the folder's other files {_in_words(self._total)}"
        raise CheckpointError(
            f"{name} holds more JSON than any real checkpoint, and would take gigabytes of memory",
            where=path,
            found=f"{_in_words(size)}{rest}",
            expected=f"at most {_in_words(JsonSize(_MOST_BYTES, _MOST_MARKS))} in all JSON files and headers",
            todo="do not use this checkpoint unless you know why it is so large",
        )


def _in_words(size: JsonSize) -> str:
    return f"{size.bytes} bytes with {size.marks} commas, colons and opening brackets"


def read_json(path: Path, name: str, total: JsonTotal) -> Any:
    """The content of a JSON file, which messages call `name`, and which is counted to a folder's total.

    Raises:
        CheckpointError: if it is absent, too large, no JSON, nested too deeply, or repeats a key of an object.

    """
    text = _text(path, name, total)
    if not text.strip():
        raise CheckpointError(f"{name} is empty", where=path, todo="download or write the checkpoint again")
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, name, path))
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: also a number of too many digits
        reason = str(error) or "out of memory"
        raise CheckpointError(
            f"{name} is not valid JSON: {reason}", where=path, found=_pointer(text[:200].encode())
        ) from error


def _text(path: Path, name: str, total: JsonTotal) -> str:
    try:
        size = _regular_size(path, name)
        content = path.read_bytes() if size <= _MOST_BYTES else b""
        total.add(path, name, JsonSize(max(size, len(content)), _marks_in(content)))
        return content.decode()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise CheckpointError(f"{name} cannot be read: {error}", where=path) from error


def header_size(path: Path, name: str) -> JsonSize:
    """How much JSON the header of a safetensors file holds, or more of the file than any header may have.

    Raises:
        CheckpointError: if it cannot be read.

    """
    try:
        _regular_size(path, name)
        with path.open("rb") as opened:
            length = left = min(int.from_bytes(opened.read(8), "little"), _MOST_BYTES + 1)
            marks = 0
            while chunk := opened.read(min(left, _AT_ONCE)):
                left -= len(chunk)
                marks += _marks_in(chunk)
    except (OSError, ValueError) as error:
        raise _unreadable(path, name, error) from error
    return JsonSize(length - left, marks)


def _marks_in(text: bytes) -> int:
    return sum(map(text.count, _MARKS))


def read_header(path: Path, name: str) -> list[StoredTensor]:
    """The tensors of a safetensors file, which messages and `StoredTensor.file` call `name`.

    Raises:
        CheckpointError: if it is absent, damaged, or holds a dtype that torch does not have.

    """
    try:
        _regular_size(path, name)
        return list(_tensors(path, name))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: torch cannot map it
        raise _unreadable(path, name, error) from error


def _unreadable(path: Path, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a readable safetensors file: {error}",
        where=path,
        found=_what_it_is(path),
        todo="download or write the file again",
    )


def _tensors(path: Path, file: str) -> Iterator[StoredTensor]:
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            view = opened.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{name} in {file} has the dtype {view.get_dtype()}, which is not supported", where=path
                )
            yield StoredTensor(name, tuple(view.get_shape()), dtype, file)


def _regular_size(path: Path, name: str) -> int:
    """Bytes of a regular file. Opening a pipe would wait forever, and a device may have no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name} is not a regular file", where=path, todo="replace it by the file itself")
    return status.st_size


def _what_it_is(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return _pointer(opened.read(200)) or f"{path.stat().st_size} bytes"
    except (OSError, ValueError) as error:
        return f"nothing that can be opened ({error}); a link that leads nowhere?"


def _pointer(start: bytes) -> str | None:
    """What the first bytes of a file that is not what it should be look like, if they can be told."""
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in place of the file: run `git lfs pull`"
    if start.lstrip()[:1] == b"<" and b"\0" not in start[:8]:  # the length of a header may begin with the same byte
        return "an HTML page: the download saved an error page"
    return None


def _unique(pairs: list[tuple[str, Any]], name: str, path: Path) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise CheckpointError(
            f"{name} has keys more than once: {listing(twice)}",
            where=path,
            todo="keep one of each: readers differ in which one they take",
        )
    return result
