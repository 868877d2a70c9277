"""Reading a checkpoint folder: JSON files and the headers of safetensors files, never a tensor.

This is the only place that opens a checkpoint's files before an engine loads the weights. Files may be links, as all
of them are in the Hugging Face cache; what may not leave the folder are names that stand *inside* a file.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from quant_core.errors import CheckpointError, listing
from quant_core.files import JsonTotal, header_size, read_header, read_json
from quant_core.stored import StoredForm, StoredTensor

_READERS = 8


class CheckpointFolder:
    """One local checkpoint folder.

    Raises:
        CheckpointError: if `path` is no folder. Damaged files raise when they are first read.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isdir(path):  # unlike Path's, it is False for names that no file can have
            raise CheckpointError(f"{self.path} is not a folder", todo="give the folder that holds config.json")

    @classmethod
    def locate(cls, model: str, revision: str | None = None, cache_dir: str | None = None) -> "CheckpointFolder | None":
        """The folder of a model given as a path or, if it is in the Hugging Face cache, by its hub name.

        Nothing is downloaded: None means that this machine has no such folder.
        """
        if os.path.isdir(model):
            return cls(model)
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError
        except ImportError:
            return None
        try:
            # What vLLM leaves out, such as a README, may be missing; what an index names is missed when it is read.
            return cls(
                snapshot_download(
                    model, revision=revision, cache_dir=cache_dir, local_files_only=True, ignore_patterns="*"
                )
            )
        except (OSError, ValueError, HFValidationError):
            return None

    def __repr__(self) -> str:
        return f"CheckpointFolder({str(self.path)!r})"

    def files(self, pattern: str) -> list[str]:
        """Names of the top-level files that match a glob pattern, sorted; hidden ones are left out, as a shell does.

        Raises:
            CheckpointError: if the folder cannot be listed.

        """
        try:
            found = [p for p in self.path.iterdir() if p.match(pattern) and not p.name.startswith(".")]
            return sorted(p.name for p in found if not p.is_dir())
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be listed: {error}") from error

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder.

        Raises:
            CheckpointError: if it is absent, too large, no JSON, nested too deeply, or repeats a key of an object.

        """
        return read_json(self.path / name, name, self._parsed)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, empty if there is none.

        Raises:
            CheckpointError: if it cannot be read, or holds no object.

        """
        if not self.files("config.json"):
            return {}
        config = self.read_json("config.json")
        if not isinstance(config, dict):
            raise CheckpointError("config.json holds no object", where=self.path, found=type(config).__name__)
        return config

    @cached_property
    def declared_method(self) -> str | None:
        """The quantisation method that config.json names, if any."""
        sections = [section for section in (self.config, self.config.get("text_config")) if isinstance(section, dict)]
        for name in ("quantization_config", "compression_config"):  # the second was compressed-tensors' first name
            for quantization in (section.get(name) for section in sections):
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
        for index, weight_map in self._weight_maps.items():
            missing = sorted(set(weight_map.values()) - set(present))
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
        # The one index by which vLLM chooses files.
        chosen = self._weight_maps.get("model.safetensors.index.json")
        return tuple(present) if chosen is None else tuple(sorted(set(chosen.values())))

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the model by name, from the files' headers.

        Raises:
            CheckpointError: if a file is damaged or its header too large, two files hold one tensor, or the index and
                the files differ.

        """
        paths = [self.path / file for file in self.weight_files]
        with ThreadPoolExecutor(_READERS) as readers:
            # All are counted before one is parsed.
            for path, size in zip(paths, readers.map(header_size, paths, self.weight_files), strict=True):
                self._parsed.add(path, path.name, size)
            headers = list(readers.map(read_header, paths, self.weight_files))
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
        for index, weight_map in self._weight_maps.items():
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

    @cached_property
    def _parsed(self) -> JsonTotal:
        """How much JSON was parsed so far."""
        return JsonTotal()

    @cached_property
    def _weight_maps(self) -> dict[str, dict[str, str]]:
        """Tensor name to file name, of each index file."""
        return {index: self._weight_map(index) for index in self.files("*.safetensors.index.json")}

    def _weight_map(self, index: str) -> dict[str, str]:
        content = self.read_json(index)
        # One of msModelSlim's adapters writes the bare map.
        weight_map = content.get("weight_map", content) if isinstance(content, dict) else None
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
            raise CheckpointError(f"{index} has no weight_map of file names", where=self.path / index)
        for file in set(weight_map.values()):
            self.check_contained(file, index)
        return weight_map

    def check_contained(self, name: str, source: str) -> None:
        """Refuse a file name read from `source` that would leave the folder.

        Raises:
            CheckpointError: names the file that holds the name.

        """
        kinds = (PurePosixPath(name), PureWindowsPath(name))
        if any(path.anchor or ".." in path.parts for path in kinds):  # an anchor is a root, or a Windows drive
            raise CheckpointError(
                f"{source} names a file outside the folder: {name!r}",
                where=self.path / source,
                expected="names of files in the folder",
                todo="do not use this checkpoint unless you know why it does that",
            )


class PlannedFolder(CheckpointFolder):
    """A folder whose weights are not there and not needed: nothing is known of tensors, not even their names."""

    weight_files = ()
    tensors: Mapping[str, StoredTensor] = {}
    modules: Mapping[str, StoredForm] = {}
