"""Models that are named and not given as a folder: what a hub lists, and the download that vLLM's loader would make.

A model that no format of ours recognises costs one listing. One that is recognised is downloaded by vLLM's own loader,
earlier than vLLM would, so that it lies where the workers look for it, and nothing is fetched twice.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from vllm import envs
from vllm.logger import init_logger
from vllm.transformers_utils.utils import maybe_model_redirect

from quant_core import CheckpointError, CheckpointFolder, LoadError
from quant_core.errors import listing

logger = init_logger("vllm.ascend_quant")


class UnreachableError(CheckpointError):
    """A file of a model that is not here, and that a hub does not hand out or was not asked for."""


@dataclass(frozen=True)
class _Hub:
    """How to ask one hub about one revision of a model."""

    names: Callable[[], list[str]]
    fetch: Callable[[str], str | Path]


class ListedFolder(CheckpointFolder):
    """A model on a hub: knows the names of its files, and fetches a JSON file when it is read. Holds no weights."""

    def __init__(self, model: str, hub: _Hub) -> None:
        self.path = Path(model)
        self._hub = hub
        self._names = [name for name in hub.names() if "/" not in name and not name.startswith(".")]

    def files(self, pattern: str) -> list[str]:
        return sorted(name for name in self._names if PurePosixPath(name).match(pattern))

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        raise UnreachableError(
            f"the weights of {self.path} are not downloaded, because its other files are of no known format",
            found=listing(self._names),
            todo="leave --quantization out, or name a model that is quantised in this way",
        )

    def read_json(self, name: str) -> Any:
        try:
            file = Path(self._hub.fetch(name))
        except Exception as error:
            raise UnreachableError(f"{name} of {self.path} cannot be fetched: {error}") from error
        return CheckpointFolder(file.parent).read_json(file.name)


@dataclass(frozen=True)
class NamedModel:
    """A model as a user names it, and what is needed to ask a hub about it."""

    model: str
    revision: str | None
    token: str | bool | None
    download_dir: str | None


def look_up(named: NamedModel) -> CheckpointFolder | None:
    """A model as far as it is needed to recognise it.

    None if nothing can be said: the model is no folder, and no hub knows it or answers. Whatever goes wrong here goes
    wrong in vLLM again, which then says so in its own words. (Offline, vLLM has replaced the name by the folder.)
    """
    model = maybe_model_redirect(named.model)
    if os.path.exists(model) or "://" in model:
        return CheckpointFolder.locate(model)
    hub = _modelscope if envs.VLLM_USE_MODELSCOPE else _hugging_face
    try:
        return ListedFolder(model, hub(model, named))
    except Exception as error:  # clients raise what they like, and so do the libraries under them
        logger.info("%s cannot be listed, so whether it is quantised shows in its config.json only: %s", model, error)
    return None


def download(model_config: Any, load_config: Any) -> CheckpointFolder:
    """The folder of vLLM's model, downloaded if it is named and not yet in the cache.

    Raises:
        LoadError: if it cannot be downloaded.

    """
    model: str = model_config.model
    if os.path.isdir(model):
        return CheckpointFolder(model)
    try:
        path = _from_modelscope(model_config, load_config) or _from_hugging_face(model_config, load_config)
    except Exception as error:
        raise unknown(model, model_config.revision, error) from error
    return CheckpointFolder(path)


def _from_hugging_face(model_config: Any, load_config: Any) -> str:
    # Here, because any start of vLLM looks a model up, and these import half of vLLM.
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.weight_utils import DisabledTqdm

    if load_config.load_format == "dummy":  # the shapes and types of a model stand in its weights
        load_config = replace(load_config, load_format="auto")
    get_model_loader(load_config).download_model(model_config)
    # The description may be missing still; and this tells where everything is.
    return huggingface_hub.snapshot_download(
        model_config.model,
        revision=model_config.revision,
        cache_dir=load_config.download_dir,
        allow_patterns="*.json",
        tqdm_class=DisabledTqdm,
        local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
    )


def _from_modelscope(model_config: Any, load_config: Any) -> str | None:
    from vllm.model_executor.model_loader.weight_utils import maybe_download_from_modelscope

    path = maybe_download_from_modelscope(model_config.model, model_config.revision, load_config.download_dir)
    if path is not None and load_config.download_dir:
        # vLLM's loader would ignore --download-dir here, and fetch everything a second time.
        model_config.model = path
    return path


def unknown(model: str, revision: str | None, error: Exception) -> LoadError:
    """The error for a model that is neither a folder nor to be had from a hub."""
    if model.startswith((os.sep, ".", "~")) or model.count("/") > 1:
        return LoadError(f"there is no folder {model}", todo="correct the path")
    at = f" in the revision {revision}" if revision else ""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        place, todo = "not in the cache", "download it on a machine with access, or unset HF_HUB_OFFLINE"
    elif envs.VLLM_USE_MODELSCOPE:
        place, todo = "cannot be had from ModelScope", "for a private model log in (`modelscope login`)"
    else:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        place, todo = (
            f"cannot be had from {endpoint}",
            "for a private or gated one log in (`hf auth login`) or set HF_TOKEN",
        )
    return LoadError(
        f"{model} is no folder, and {place}{at}",
        found=str(error).strip().partition("\n")[0],
        todo=f"correct the name or --revision; {todo}",
    )


def _hugging_face(model: str, named: NamedModel) -> _Hub:
    api, revision, token = huggingface_hub.HfApi(), named.revision, named.token

    def names() -> list[str]:
        # Not list_repo_files, which tries for half a minute when no hub can be reached.
        info = api.model_info(model, revision=revision, token=token, timeout=10)
        return [file.rfilename for file in info.siblings or ()]

    return _Hub(
        names,
        lambda name: api.hf_hub_download(model, name, revision=revision, cache_dir=named.download_dir, token=token),
    )


def _modelscope(model: str, named: NamedModel) -> _Hub:
    from modelscope.hub.api import HubApi
    from modelscope.hub.file_download import model_file_download

    revision = named.revision
    return _Hub(
        lambda: [file["Path"] for file in HubApi().get_model_files(model, revision=revision, recursive=True)],
        lambda name: model_file_download(model, name, revision=revision, cache_dir=named.download_dir),
    )
