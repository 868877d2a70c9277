"""JSON that takes many times its bytes in memory is refused before it is parsed; what real checkpoints have is read."""

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant_core import CheckpointError, CheckpointFolder
from quant_core.files import JsonSize, JsonTotal, read_json

MARKS = 2**24  # commas, colons and opening brackets that all JSON of a folder may have together
INDEX = "model.safetensors.index.json"


def repeated(element: str) -> Callable[[int], str]:
    """Makes lists of one element with so many marks."""
    return lambda marks: "[" + f"{element}," * (marks // marks_of(f"{element},")) + "0]"


def keys(value: str) -> Callable[[int], str]:
    """Makes objects of different keys with so many marks."""
    return lambda marks: "{" + ",".join(f'"{i}":{value}' for i in range(marks // 2)) + "}"


def marks_of(text: str) -> int:
    return sum(map(text.count, ",:[{"))


EXPLOSIVE = {
    "lists": repeated("[]"),
    "objects": repeated("{}"),
    "objects of one": repeated('{"":0}'),
    "objects of one list": repeated('{"a":[]}'),
    "numbers": repeated("1.5"),
    "strings": repeated('"\\u0100"'),
    "keys": keys("0"),
}


def memory(run: Callable[[], Any]) -> int:
    """Bytes that Python held at most."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def refusal() -> Callable[[Callable[[], Any]], str]:
    """The message with which JSON is refused for its size."""

    def refuse(run: Callable[[], Any]) -> str:
        with pytest.raises(CheckpointError, match="holds more JSON than any real checkpoint") as raised:
            run()
        assert f"at most 268435456 bytes with {MARKS} commas" in str(raised.value)
        return str(raised.value)

    return refuse


def header(path: Path, text: bytes) -> int:
    """Write a safetensors file with this header and no data; its size."""
    return path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("kind", EXPLOSIVE)
def test_no_mark_takes_more_memory_than_the_limit_counts_on(kind: str, tmp_path: Path) -> None:
    """Beside the bytes, which are held twice: as they are and as text."""
    text = EXPLOSIVE[kind](2**17)
    path = tmp_path / "a.json"
    path.write_text(text)
    assert memory(lambda: read_json(path, "a.json", JsonTotal())) < 140 * marks_of(text) + 3 * len(text)


@pytest.mark.parametrize("kind", ["lists", "objects", "objects of one list"])
def test_a_file_that_explodes(kind: str, tmp_path: Path, refusal: Callable[[Callable[[], Any]], str]) -> None:
    text = EXPLOSIVE[kind](MARKS + 8)
    (tmp_path / "config.json").write_text(text)
    messages: list[str] = []
    peak = memory(lambda: messages.append(refusal(lambda: CheckpointFolder(tmp_path).config)))
    assert f"found: {len(text)} bytes with {marks_of(text)} commas, colons and opening brackets\n" in messages[0]
    assert f"where: {tmp_path / 'config.json'}" in messages[0]
    assert peak < 1.1 * len(text)  # it was read, and not parsed


def test_files_that_explode_together(refusal: Callable[[Callable[[], Any]], str]) -> None:
    total, part = JsonTotal(), JsonSize(2**27, MARKS * 3 // 5)
    for _ in range(3):
        total.add(Path("config.json"), "config.json", part)  # the same file counts once
    message = refusal(lambda: total.add(Path("other.json"), "other.json", part))
    assert message.startswith("other.json holds")
    assert f"; with the folder's other files {2 * part.bytes} bytes with {2 * part.marks} commas" in message


HEADERS: dict[str, Callable[[int], str]] = {
    "a shape": lambda marks: '{"a":{"dtype":"I8","shape":[' + "0," * marks + '0],"data_offsets":[0,0]}}',
    "nothing of a header": repeated("[]"),
    "metadata": lambda marks: '{"__metadata__":{' + '"a":"",' * (marks // 2) + "}}",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_explodes(kind: str, tmp_path: Path, refusal: Callable[[Callable[[], Any]], str]) -> None:
    size = header(tmp_path / "m.safetensors", HEADERS[kind](MARKS + 8).encode())
    messages: list[str] = []
    peak = memory(lambda: messages.append(refusal(lambda: CheckpointFolder(tmp_path).tensors)))
    assert "m.safetensors holds more JSON" in messages[0]
    assert f"found: {size - 8} bytes" in messages[0]
    assert peak < 0.1 * size  # it is read in pieces


def test_headers_that_explode_together(tmp_path: Path, refusal: Callable[[Callable[[], Any]], str]) -> None:
    for number in range(4):
        header(tmp_path / f"m{number}.safetensors", HEADERS["a shape"](MARKS * 3 // 10).encode())
    message = refusal(lambda: CheckpointFolder(tmp_path).tensors)
    assert "m3.safetensors holds more JSON" in message
    assert "; with the folder's other files" in message


def test_a_header_longer_than_its_file(tmp_path: Path) -> None:
    """What it claims is not counted, and not allocated."""
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match=r"m\.safetensors is not a readable safetensors file"):
        _ = CheckpointFolder(tmp_path).tensors


def deepseek_v3() -> Iterator[str]:
    """Names of 134,000 tensors: three for each linear layer of 256 experts in 58 layers, and some more."""
    experts = [f"experts.{expert}" for expert in range(256)] + ["shared_experts"]
    linear = [f"mlp.{expert}.{name}_proj" for expert in experts for name in ("gate", "up", "down")]
    linear += [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    for layer in range(3, 61):
        for module in linear:
            for suffix in ("weight", "weight_scale", "weight_offset"):
                yield f"model.layers.{layer}.{module}.{suffix}"


def test_a_very_large_checkpoint_is_read(tmp_path: Path) -> None:
    """DeepSeek-V3: description, index and headers, with a fourth of the limit at most."""
    files: dict[str, dict[str, Any]] = {f"quant_model_weights-{n:05}-of-00160.safetensors": {} for n in range(1, 161)}
    index: dict[str, str] = {}
    for name, file in zip(deepseek_v3(), [f for f in files for _ in range(900)], strict=False):
        index[name] = file
        files[file][name] = {"dtype": "BF16", "shape": [0, 18432], "data_offsets": [5368709120, 5368709120]}
    described = dict.fromkeys(index, "W8A8_DYNAMIC")
    total = 0
    for file, tensors in files.items():
        # As long as a real one; but with offsets that an empty file has.
        text = json.dumps(tensors).replace("5368709120", "0".rjust(10))
        header(tmp_path / file, text.encode())
        total += marks_of(text)
    for name, content in ((INDEX, {"weight_map": index}), ("quant_model_description.json", described)):
        text = json.dumps(content)
        (tmp_path / name).write_text(text)
        total += marks_of(text)
    folder = CheckpointFolder(tmp_path)
    assert folder.tensors.keys() == index.keys() == folder.read_json("quant_model_description.json").keys()
    assert len(index) > 130_000
    assert total < MARKS / 4
