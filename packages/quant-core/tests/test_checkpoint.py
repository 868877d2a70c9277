"""A checkpoint folder: which files count, and what it refuses."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant_core import CheckpointError, CheckpointFolder

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(folder: Path, file: str, **shapes: tuple[int, ...]) -> None:
    """A weights file; `a__b` is the tensor a.b."""
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, folder / file)


def index(folder: Path, weight_map: object, file: str = INDEX) -> None:
    """An index file."""
    (folder / file).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two files and their index."""
    folder = tmp_path / "a folder [1] 层"
    folder.mkdir()
    weights(folder, ONE, l__0__weight=(4, 2), l__0__weight_scale=(4, 1))
    weights(folder, TWO, l__1__weight=(6, 4), head=(3,))
    index(folder, {"l.0.weight": ONE, "l.0.weight_scale": ONE, "l.1.weight": TWO, "head": TWO})
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    return folder


def state(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Every file below a folder with its size and time."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


def refused(folder: Path, question: str = "tensors") -> str:
    """The message with which a folder is refused."""
    with pytest.raises(CheckpointError) as raised:
        getattr(CheckpointFolder(folder), question)
    return str(raised.value)


def test_tensors_and_modules_of_a_folder(sharded: Path) -> None:
    before = state(sharded)
    folder = CheckpointFolder(sharded)
    assert folder.weight_files == (ONE, TWO)
    assert {t.name: (t.shape, t.dtype, t.file) for t in folder.tensors.values()} == {
        "l.0.weight": ((4, 2), torch.float32, ONE),
        "l.0.weight_scale": ((4, 1), torch.float32, ONE),
        "l.1.weight": ((6, 4), torch.float32, TWO),
        "head": ((3,), torch.float32, TWO),
    }
    assert {m: sorted(form.tensors) for m, form in folder.modules.items()} == {
        "l.0": ["weight", "weight_scale"],
        "l.1": ["weight"],
        "": ["head"],
    }
    assert folder.modules["l.1"].module == "l.1"
    assert folder.modules["l.0"].shape("weight_scale", ()) == (4, 1)
    assert folder.config == {"model_type": "x"}
    assert folder.files("*.json") == ["config.json", INDEX]
    assert repr(folder) == f"CheckpointFolder({str(sharded)!r})"
    assert state(sharded) == before, "the folder was written to"


@pytest.mark.parametrize("path", ["absent", "file", "dangling", "a\0b", "x" * 5000])
def test_what_is_no_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointFolder(tmp_path / path)


def test_a_folder_without_index_is_all_its_files(tmp_path: Path) -> None:
    weights(tmp_path, "b.safetensors", b=(1,))
    weights(tmp_path, "a.safetensors", a=(1,))
    (tmp_path / "c.bin").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\x16\7")  # macOS puts such files beside those it copies
    assert CheckpointFolder(tmp_path).weight_files == ("a.safetensors", "b.safetensors")
    assert set(CheckpointFolder(tmp_path).tensors) == {"a", "b"}


def test_vllm_s_index_chooses_files(tmp_path: Path) -> None:
    """A second copy of the weights beside it (consolidated.safetensors) is not loaded."""
    weights(tmp_path, ONE, a=(1,))
    weights(tmp_path, "consolidated.safetensors", a=(1,))
    index(tmp_path, {"a": ONE})
    assert CheckpointFolder(tmp_path).weight_files == (ONE,)
    assert CheckpointFolder(tmp_path).tensors["a"].file == ONE


def test_another_index_is_checked_and_chooses_nothing(tmp_path: Path) -> None:
    weights(tmp_path, "quant_model_weights-1.safetensors", a=(1,))
    weights(tmp_path, "mtp.safetensors", b=(1,))
    name = "quant_model_weights.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"a": "quant_model_weights-1.safetensors"}))  # a bare map
    assert set(CheckpointFolder(tmp_path).tensors) == {"a", "b"}
    (tmp_path / name).write_text(json.dumps({"a": "mtp.safetensors"}))
    assert f"{name} and the weight files differ for 1 tensors: a" in refused(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "found: nothing" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    message = refused(tmp_path)
    assert "no *.safetensors file" in message
    assert "found: pytorch_model.bin" in message


def test_a_file_of_the_index_is_missing(sharded: Path) -> None:
    (sharded / TWO).unlink()
    message = refused(sharded)
    assert f"{INDEX} names weight files that are not in the folder: {TWO}" in message
    assert "finish the download" in message


def test_a_tensor_of_the_index_is_missing(sharded: Path) -> None:
    weights(sharded, TWO, head=(3,))
    assert f"{INDEX} and the weight files differ for 1 tensors: l.1.weight" in refused(sharded)


def test_a_tensor_is_in_another_file_than_the_index_says(sharded: Path) -> None:
    weights(sharded, ONE, l__0__weight=(4, 2), l__0__weight_scale=(4, 1), head=(3,))
    weights(sharded, TWO, l__1__weight=(6, 4))
    assert "differ for 1 tensors: head" in refused(sharded)


def test_two_files_hold_one_tensor(sharded: Path) -> None:
    weights(sharded, TWO, l__1__weight=(6, 4), head=(3,), l__0__weight=(4, 2))
    message = refused(sharded)
    assert f"two files hold the tensor l.0.weight: {ONE} and {TWO}" in message


def test_a_damaged_file_among_others(sharded: Path) -> None:
    (sharded / TWO).write_bytes(b"")
    assert f"{TWO} is not a readable safetensors file" in refused(sharded)
    assert "an empty file" in refused(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.safetensors",
        "../w.safetensors",
        "sub/../../w.safetensors",
        "C:\\w.safetensors",
        "C:w.safetensors",
        "\\w.safetensors",
        "\\\\server\\share\\w.safetensors",
        "..\\w.safetensors",
        "sub\\..\\..\\w.safetensors",
    ],
)
def test_a_name_in_an_index_may_not_leave_the_folder(name: str, sharded: Path) -> None:
    weights(sharded.parent, "w.safetensors", a=(1,))
    index(sharded, {"a": name})
    message = refused(sharded)
    assert f"{INDEX} names a file outside the folder: {name!r}" in message
    assert refused(sharded, "weight_files") == message


@pytest.mark.parametrize("name", ["sub/w.safetensors", "./" + ONE, "", "config.json", "w\0.safetensors", "\ud800"])
def test_a_name_in_an_index_must_be_a_weights_file_of_the_folder(name: str, sharded: Path) -> None:
    (sharded / "sub").mkdir()
    weights(sharded, "sub/w.safetensors", a=(1,))
    index(sharded, {"a": name})
    assert f"{INDEX} names weight files that are not in the folder" in refused(sharded)


@pytest.mark.parametrize("content", ["[]", "1", "null", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"a": 1}'])
def test_an_index_without_a_map_of_names(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    assert f"{INDEX} has no weight_map of file names" in refused(sharded)


def test_the_hugging_face_cache(sharded: Path, tmp_path: Path) -> None:
    """There, every file is a link to ../../blobs/<hash>."""
    model = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = model / "snapshots" / "0123abcd", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    before = state(model)
    folder = CheckpointFolder(snapshot)
    assert set(folder.tensors) == {"l.0.weight", "l.0.weight_scale", "l.1.weight", "head"}
    assert folder.config == {"model_type": "x"}
    assert state(model) == before
    (blobs / "0").unlink()  # config.json comes first: a download that was broken off
    assert "config.json cannot be read" in refused(snapshot, "config")
    (snapshot / TWO).resolve().unlink()
    assert "a link that leads nowhere?" in refused(snapshot)


def test_locate_answers_for_paths_and_for_the_cache(sharded: Path, tmp_path: Path) -> None:
    folder = CheckpointFolder.locate(str(sharded))
    assert folder is not None
    assert folder.path == sharded
    for name in ("no/such-model", "not a name", "x" * 5000, "", "a\0b"):
        assert CheckpointFolder.locate(name, cache_dir=str(tmp_path / "hub")) is None
    model = tmp_path / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    sharded.rename(model / "snapshots" / ("0" * 40))
    found = CheckpointFolder.locate("org/name", cache_dir=str(tmp_path / "hub"))
    assert found is not None
    assert found.path == model / "snapshots" / ("0" * 40)
    assert CheckpointFolder.locate("org/name", revision="other", cache_dir=str(tmp_path / "hub")) is None


def test_locate_without_huggingface_hub(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what makes an import fail
    assert CheckpointFolder.locate("org/name") is None
    assert CheckpointFolder.locate(str(sharded)) is not None


def test_a_file_name_that_is_no_unicode(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")).touch()
    except OSError:
        pytest.skip("this file system has Unicode names only")
    message = refused(tmp_path)
    assert "\\udcff.safetensors is not a readable safetensors file" in message
    message.encode()


def test_a_folder_that_vanishes(sharded: Path) -> None:
    folder = CheckpointFolder(sharded)
    sharded.rename(sharded.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        _ = folder.tensors
