"""Reading files that strangers wrote: every failure is a CheckpointError with the file's name."""

import json
import os
import struct
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant_core import CheckpointError
from quant_core.files import JsonTotal, read_header
from quant_core.files import read_json as read_counted

HTML = b"<!DOCTYPE html>\n<html><title>404</title></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def read_json(path: Path, name: str) -> Any:
    """A file by itself."""
    return read_counted(path, name, JsonTotal())


def raw(header: bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it is."""
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype: str = "I8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, object]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(read: Callable[[Path, str], Any], path: Path) -> str:
    """The message with which a file is refused; it must name the file and be printable."""
    with pytest.raises(CheckpointError) as raised:
        read(path, path.name)
    message = str(raised.value)
    assert path.name in message
    message.encode()
    return message


DTYPES = {
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


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_tensor_of_each_dtype(name: str, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    if name == "F8_E8M0" and metadata.version("safetensors").startswith("0.5."):
        pytest.skip("this safetensors does not know it")
    size = torch.Size(shape).numel() * dtype.itemsize
    header = {"__metadata__": {"format": "pt"}, "a.b": entry(name, shape, (0, size))}
    (tmp_path / "w.safetensors").write_bytes(raw(json.dumps(header).encode(), bytes(size)))
    (found,) = read_header(tmp_path / "w.safetensors", "w.safetensors")
    assert (found.name, found.shape, found.dtype, found.file) == ("a.b", shape, dtype, "w.safetensors")


def test_tensors_as_torch_writes_them(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.int8), "b.c": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = {t.name: (t.shape, t.dtype) for t in read_header(tmp_path / "w.safetensors", "w.safetensors")}
    assert found == {"a": ((2, 3), torch.int8), "b.c": ((4,), torch.bfloat16)}


ONE = json.dumps({"a": entry()}).encode()
DAMAGED_WEIGHTS = {
    "empty": (b"", "an empty file"),
    "git-lfs": (LFS, "git lfs pull"),
    "html": (HTML, "HTML page"),
    "html after spaces": (b"\n\n <html>", "HTML page"),
    "another format": (b"PK\x03\x04 not safetensors", "20 bytes"),
    "a byte too few": (raw(ONE, b"\0"), "69 bytes"),
    "a byte too many": (raw(ONE, b"\0\0\0"), "71 bytes"),
    "cut inside the header": (raw(ONE)[:30], "30 bytes"),
    "endless header": (struct.pack("<Q", 2**63) + b"{}", "bytes"),
    "shape beyond the data": (raw(json.dumps({"a": entry(shape=(3,))}).encode(), b"\0\0"), "bytes"),
    "size beyond 64 bits": (raw(json.dumps({"a": entry(shape=(2**62, 2**62))}).encode(), b"\0\0"), "bytes"),
    "negative size": (raw(json.dumps({"a": entry(shape=(-2,))}).encode(), b"\0\0"), "bytes"),
    "deep header": (raw(b'{"a": ' * 500), "bytes"),
    "deeper header": (raw(b'{"a": ' * 500_000), "bytes"),
    "no UTF-8": (raw(b"\xff\xfe{}"), "bytes"),
}


@pytest.mark.parametrize(("content", "told"), DAMAGED_WEIGHTS.values(), ids=DAMAGED_WEIGHTS)
def test_a_damaged_weights_file(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model-00001.safetensors"
    path.write_bytes(content)
    message = refusal(read_header, path)
    assert "is not a readable safetensors file" in message
    assert told in message
    assert "what to do: download or write the file again" in message


@pytest.mark.parametrize("dtype", ["F4", "C64", "I4", "F6_E2M3"])
def test_a_dtype_that_torch_does_not_have(dtype: str, tmp_path: Path) -> None:
    """Some of them safetensors itself does not know."""
    path = tmp_path / "w.safetensors"
    size = {"F4": 8, "C64": 16, "F6_E2M3": 12, "I4": 8}[dtype]
    content = json.dumps({"a": entry(dtype, (16 if dtype != "C64" else 2,), (0, size))}).encode()
    path.write_bytes(raw(content, bytes(size)))
    refusal(read_header, path)


def test_json_as_it_should_be(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"层": [1, 2.5, null, true], "a": {"a": {}}, "limit": [0.0, Infinity], "bad": NaN}', encoding="utf-8"
    )
    content = read_json(path, "config.json")
    assert content["层"] == [1, 2.5, None, True]
    assert content["a"] == {"a": {}}
    assert content["limit"] == [0.0, float("inf")]  # transformers writes such configs
    assert content["bad"] != content["bad"]


DAMAGED_JSON = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t ", "is empty"),
    "cut off": (b"{", "is not valid JSON"),
    "a comma too many": (b'{"a": 1,}', "is not valid JSON"),
    "two values": (b'{"a": 1} {"b": 2}', "Extra data"),
    "git-lfs": (LFS, "git lfs pull"),
    "html": (HTML, "HTML page"),
    "no UTF-8": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 3}', "keys more than once: a"),
    "a key twice inside": (b'{"x": [{"k": 1, "k": 1}]}', "keys more than once: k"),
    "half a surrogate twice": (b'{"\\ud800": 1, "\\ud800": 1}', "keys more than once: \\ud800"),
}


@pytest.mark.parametrize(("content", "told"), DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_damaged_json(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "some.index.json"
    path.write_bytes(content)
    assert told in refusal(read_json, path)


def test_a_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as opened:
        opened.truncate(2**40)  # takes no space
    started = time.monotonic()
    assert "at most 268435456 bytes" in refusal(read_json, path)
    assert time.monotonic() - started < 5


READERS = pytest.mark.parametrize("read", [read_json, read_header])


@READERS
@pytest.mark.parametrize("kind", ["absent", "dangling", "folder", "pipe", "endless", "circle", "unreadable"])
def test_what_is_no_file(read: Callable[[Path, str], Any], kind: str, tmp_path: Path) -> None:
    """Nothing is opened that would block (a pipe) or never end (a device)."""
    path = tmp_path / "model.safetensors"
    if kind == "dangling":
        path.symlink_to(tmp_path / "blobs" / "0123")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "unreadable":
        # Memory of this process at address 0: reading it fails even for root, who may read every file.
        path.symlink_to("/proc/self/mem")
    refusal(read, path)


@READERS
@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have(read: Callable[[Path, str], Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path / name, name)


def test_a_header_that_claims_to_be_huge_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", 90 * 2**20))
        opened.truncate(2**33)
    assert len(refusal(read_header, path)) < 1000
