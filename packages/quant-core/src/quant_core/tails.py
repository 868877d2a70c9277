"""Files that end in zeros, as an interrupted download leaves them that had reserved the whole length before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from quant_core.errors import CheckpointError

_CHUNK = 1 << 20
_LAST = 64


def zero_tail(path: Path) -> tuple[int, list[str]]:
    """The last tensors of a safetensors file that hold nothing but zeros, and where the first of them begins.

    Of nearly every file this reads the last few bytes. The file must be one whose header was read.

    Returns:
        position in the file, and names in the order of the file; its size and no name if the last tensor holds more.

    Raises:
        CheckpointError: if the file has changed since.

    """
    try:
        with path.open("rb") as opened:
            size = opened.seek(0, 2)
            start, names = size, list[str]()
            if _is_zero(opened, max(0, size - _LAST), size):
                for begin, end, name in _from_the_last(opened):
                    if not _is_zero(opened, begin, end):
                        break
                    start, names = begin, [name, *names]
            return start, names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} has changed while it was read: {error}", where=path) from error


def _from_the_last(opened: BinaryIO) -> Iterator[tuple[int, int, str]]:
    """Begin, end and name of every tensor with values, the last one of the file first."""
    opened.seek(0)
    length = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(length))
    offsets = ((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    for (begin, end), name in sorted(offsets, reverse=True):
        if begin < end:
            yield 8 + length + begin, 8 + length + end, name


def _is_zero(opened: BinaryIO, begin: int, end: int) -> bool:
    opened.seek(begin)
    while begin < end:
        part = opened.read(min(_CHUNK, end - begin))
        if not part or part.count(0) != len(part):
            return False
        begin += len(part)
    return True
