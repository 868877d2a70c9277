"""Files that end in zeros."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant_core import CheckpointError
from quant_core.tails import zero_tail

SIZE = 3000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Four tensors of the same size, in the order of their names."""
    save_file({name: torch.ones(SIZE, dtype=torch.int8) for name in "abcd"}, tmp_path / "file.safetensors")
    return tmp_path / "file.safetensors"


def overwrite(file: Path, count: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - count] + bytes(count))


@pytest.mark.parametrize(
    ("zeros", "names"),
    [(0, ""), (1, ""), (SIZE - 1, ""), (SIZE, "d"), (2 * SIZE - 1, "d"), (2 * SIZE, "cd"), (4 * SIZE, "abcd")],
)
def test_what_is_zero_from_end_to_end(file: Path, zeros: int, names: str) -> None:
    overwrite(file, zeros)
    assert zero_tail(file) == (file.stat().st_size - len(names) * SIZE, list(names))


def test_tensors_without_values_are_no_evidence(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(SIZE), "b": torch.zeros(SIZE), "c": torch.zeros(0)}, file)
    assert zero_tail(file)[1] == ["b"]


def test_zeros_before_the_end_are_not_looked_at(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3 * SIZE : -1] = bytes(3 * SIZE - 1)
    file.write_bytes(data)
    assert zero_tail(file) == (len(data), [])


@pytest.mark.parametrize("content", [b"", bytes(100), b"\x02" + bytes(7) + b"[]" + bytes(100)])
def test_a_file_that_was_exchanged(tmp_path: Path, content: bytes) -> None:
    """Its header was read before, so what is there now is no checkpoint's fault."""
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.safetensors has changed while it was read"):
        zero_tail(tmp_path / "file.safetensors")
