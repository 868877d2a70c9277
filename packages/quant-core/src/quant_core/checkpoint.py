"""Reading a checkpoint folder: JSON files and the headers of safetensors files, never a tensor.

This is the only place that opens a checkpoint's files before an engine loads the weights. Files may be links, as all
of them are in the Hugging Face cache; what may not leave the folder are names that stand *inside* a file.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quant_core.errors import CheckpointError, listing
from quant_core.schemes.context import StoredForm, StoredTensor

_JSON_LIMIT = 256 * 2**20
_READERS = 8

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


class CheckpointFolder:
    """One local checkpoint folder.

    Raises:
        CheckpointError: if `path` is no folder. Damaged files raise when they are first read.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a folder", todo="give the folder that holds config.json")

    @classmethod
    def locate(cls, model: str, revision: str | None = None, cache_dir: str | None = None) -> "CheckpointFolder | None":
        """The folder of a model given as a path or, if it is in the Hugging Face cache, by its hub name.

        Nothing is downloaded: None means that this machine has no such folder.
        """
        if Path(model).is_dir():
            return cls(model)
        try:
            from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional, and slow to import
            from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
        except ImportError:
            return None
        try:
            return cls(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except (OSError, ValueError, HFValidationError):
            return None

    def __repr__(self) -> str:
        return f"CheckpointFolder({str(self.path)!r})"

    def files(self, pattern: str) -> list[str]:
        """Names of the top-level files that match a glob pattern, sorted."""
        return sorted(p.name for p in self.path.iterdir() if p.match(pattern) and not p.is_dir())

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder.

        Raises:
            CheckpointError: if it is absent, too large, no JSON, nested too deeply, or repeats a key of an object.

        """
        path = self.path / name
        try:
            if path.stat().st_size > _JSON_LIMIT:
                raise CheckpointError(f"{name} is larger than {_JSON_LIMIT} bytes", where=path)
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}", where=path) from error
        if not text.strip():
            raise CheckpointError(f"{name} is empty", where=path, todo="download or write the checkpoint again")
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, name, path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(
                f"{name} is not valid JSON: {error}", where=path, found=_pointer(text.encode()[:200])
            ) from error

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, empty if there is none."""
        config = self.read_json("config.json") if (self.path / "config.json").exists() else {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def declared_method(self) -> str | None:
        """The quantisation method that config.json names, if any."""
        for section in (self.config, self.config.get("text_config")):
            quantization = section.get("quantization_config") if isinstance(section, dict) else None
            if isinstance(quantization, dict) and isinstance(quantization.get("quant_method"), str):
                return quantization["quant_method"] or None
        return None

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files whose tensors make up the model: all of the folder's, as vLLM loads them.

        Raises:
            CheckpointError: if there is none, or an index names a file that is not there or not in the folder.

        """
        present = self.files("*.safetensors")
        indices = self.files("*.safetensors.index.json")
        for index in indices:
            missing = sorted(set(self._weight_map(index).values()) - set(present))
            if missing:
                raise CheckpointError(
                    f"{index} names weight files that are not in the folder: {listing(missing)}",
                    where=self.path / index,
                    found=listing(present) or "no *.safetensors file",
                    todo="finish the download, or remove the index if it belongs to another checkpoint",
                )
        if not present:
            raise CheckpointError(
                "the folder has no *.safetensors file", where=self.path, found=listing(self.files("*"), 12) or "nothing"
            )
        if "model.safetensors.index.json" in indices:  # the one index by which vLLM chooses files
            return tuple(sorted(set(self._weight_map("model.safetensors.index.json").values())))
        return tuple(present)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the model by name, from the files' headers.

        Raises:
            CheckpointError: if a file is damaged, two files hold one tensor, or the index and the files differ.

        """
        with ThreadPoolExecutor(_READERS) as readers:
            headers = list(readers.map(self._header, self.weight_files))
        tensors: dict[str, StoredTensor] = {}
        for header in headers:
            for tensor in header:
                other = tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(
                        f"two files hold the tensor {tensor.name}: {other.file} and {tensor.file}",
                        where=self.path,
                        todo="move the file that does not belong to the model out of the folder: an engine loads all "
                        "of them, and the last one wins",
                    )
        for index in self.files("*.safetensors.index.json"):
            weight_map = self._weight_map(index)
            wrong = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file != file]
            if wrong:
                raise CheckpointError(
                    f"{index} and the weight files differ for {len(wrong)} tensors: {listing(wrong)}",
                    where=self.path / index,
                    todo="finish the download, or remove the index if it belongs to another checkpoint",
                )
        return tensors

    @cached_property
    def modules(self) -> Mapping[str, StoredForm]:
        """The tensors grouped by module."""
        groups: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            groups.setdefault(module, {})[suffix] = tensor
        return {module: StoredForm(module, group) for module, group in groups.items()}

    def _weight_map(self, index: str) -> dict[str, str]:
        """Tensor name to file name, of an index file."""
        content = self.read_json(index)
        weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
        # One of msModelSlim's adapters writes the bare map.
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of file names", where=self.path / index)
        for file in set(weight_map.values()):
            self.check_contained(file, index)
        return weight_map

    def check_contained(self, name: str, source: str) -> None:
        """Refuse a file name read from `source` that would leave the folder.

        Raises:
            CheckpointError: names the file that holds the name.

        """
        if any(kind(name).is_absolute() or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath)):
            raise CheckpointError(
                f"{source} names a file outside the folder: {name!r}",
                where=self.path / source,
                expected="names of files in the folder",
                todo="do not use this checkpoint unless you know why it does that",
            )

    def _header(self, file: str) -> list[StoredTensor]:
        path = self.path / file
        try:
            return list(_read_header(path, file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a readable safetensors file: {error}",
                where=path,
                found=_what_it_is(path),
                todo="download or write the file again",
            ) from error


def _read_header(path: Path, file: str) -> Iterator[StoredTensor]:
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            view = opened.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{name} has the dtype {view.get_dtype()}, which is not supported", where=path)
            yield StoredTensor(name, tuple(view.get_shape()), dtype, file)


def _what_it_is(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return _pointer(opened.read(200)) or f"{path.stat().st_size} bytes"
    except OSError as error:
        return f"nothing that can be opened ({error.strerror}); a link that leads nowhere?"


def _pointer(start: bytes) -> str | None:
    """What the first bytes of a file that is no weights file look like, if they can be told."""
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in place of the file: run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
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
