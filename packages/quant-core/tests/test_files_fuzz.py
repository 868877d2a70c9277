"""Random files: read, or refused by a CheckpointError that names them. More of it: `nox -s fuzz`."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quant_core import CheckpointError, CheckpointFolder
from quant_core.files import JsonTotal, read_header, read_json


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that are overwritten at each example."""
    return tmp_path_factory.mktemp("files")


def raw(header: bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it is."""
    return struct.pack("<Q", len(header)) + header + body


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.integers(-2, 2**66) | st.integers(0, 40)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["I8", "F32", "BF16", "F8_E8M0", "F4", "XX"]) | JSON_VALUES,
        "shape": st.lists(SIZES, max_size=4) | JSON_VALUES,
        "data_offsets": st.tuples(SIZES, SIZES) | JSON_VALUES,
    }
)
HEADERS = (
    st.dictionaries(st.text(max_size=9) | st.just("__metadata__"), ENTRIES | JSON_VALUES, max_size=4) | JSON_VALUES
)


def attempt(read: Callable[[], Any], *names: str) -> Any:
    """What reading gives, None if it is refused; the only exception that may come of it names a file."""
    error = None
    try:
        return read()
    except CheckpointError as refusal:
        error = str(refusal)
    assert any(name in error for name in names)
    error.encode()  # can be printed
    return None


@given(st.binary(max_size=200))
@example(raw(b""))
@example(raw(b"null"))
@example(bytes(8))
def test_random_bytes_as_weights(scratch: Path, content: bytes) -> None:
    path = scratch / "bytes.safetensors"
    path.write_bytes(content)
    attempt(lambda: read_header(path, path.name), path.name)


@given(HEADERS, st.binary(max_size=64), st.integers(-3, 3), st.booleans())
def test_random_json_as_a_header(scratch: Path, header: object, body: bytes, shift: int, exact: bool) -> None:
    path = scratch / "header.safetensors"
    text = json.dumps(header, ensure_ascii=exact).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", max(len(text) + (0 if exact else shift), 0)) + text + body)
    attempt(lambda: read_header(path, path.name), path.name)


@given(st.data(), st.integers(1, 4))
def test_a_good_file_with_some_bytes_changed(scratch: Path, data: st.DataObject, changes: int) -> None:
    path = scratch / "changed.safetensors"
    tensors = {"a": ("I8", [2], [0, 2]), "b.c": ("F32", [1, 3], [2, 14])}
    header = {n: {"dtype": dtype, "shape": shape, "data_offsets": at} for n, (dtype, shape, at) in tensors.items()}
    content = bytearray(raw(json.dumps(header).encode(), bytes(14)))
    path.write_bytes(content)
    assert [tensor.name for tensor in read_header(path, path.name)] == ["a", "b.c"]
    for _ in range(changes):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    attempt(lambda: read_header(path, path.name), path.name)


@given(JSON_VALUES | st.binary(max_size=60), st.integers(0, 200))
def test_random_json(scratch: Path, value: object, cut: int) -> None:
    """Whole or cut off: read as it was written, or refused."""
    path = scratch / "random.json"
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(text[: len(text) if cut > 100 else cut])
    got = attempt(lambda: read_json(path, path.name, JsonTotal()), path.name)
    if cut > 100 and not isinstance(value, bytes):
        assert json.dumps(got) == json.dumps(value)


FILE_NAMES = st.sampled_from(
    ["model.safetensors", "model-2.safetensors", "../x.safetensors", "/x", "C:x", "a\0b", "\ud800"]
)
WEIGHT_MAPS = st.dictionaries(st.sampled_from(["a", "b.weight", "c.d"]) | st.text(max_size=4), FILE_NAMES | st.text())


@given(
    JSON_VALUES | st.fixed_dictionaries({}, optional={"weight_map": WEIGHT_MAPS | JSON_VALUES, "x": JSON_VALUES}),
    JSON_VALUES | st.fixed_dictionaries({}, optional={"quantization_config": JSON_VALUES, "text_config": JSON_VALUES}),
    st.binary(max_size=40) | st.just(raw(b'{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}', b"..")),
)
def test_random_folders(scratch: Path, index: object, config: object, weights: bytes) -> None:
    """Everything that a format asks of a folder gives an answer or a CheckpointError."""
    folder = scratch / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "model-2.safetensors").write_bytes(raw(b"{}"))
    checkpoint, files = CheckpointFolder(folder), [file.name for file in folder.iterdir()]
    for question in ("config", "declared_method", "weight_files", "tensors", "modules"):
        attempt(lambda question=question: getattr(checkpoint, question), *files)
