"""vLLM's model loaders, chosen by `--load-format`: which of them can work with the checkpoints of our formats."""

import os
from typing import Any

from vllm.logger import init_logger

from quant_core import CheckpointError, CheckpointFolder, LimitError, PlannedFolder
from vllm_ascend_quant import compat
from vllm_ascend_quant.files import hub
from vllm_ascend_quant.files.saved_folder import LOAD_FORMATS as SAVED
from vllm_ascend_quant.files.saved_folder import STORED, SavedFolder

logger = init_logger("vllm.ascend_quant")

#: Weights are made up, and the values of scales mean nothing.
DUMMY = "dummy"

#: Those that load the folder's safetensors files under their names in the checkpoint.
_CHECKPOINT = ("auto", "hf", "safetensors", "runai_streamer")

_REFUSED = {
    "pt": "it reads *.pt files, and these checkpoints are safetensors files",
    "npcache": "it reads *.bin files, and these checkpoints are safetensors files",
    "mistral": "it reads consolidated*.safetensors in Mistral's own naming, which quantisation tools do not write",
    "tensorizer": "it reads what vLLM serialised in its run-time form, without what describes the quantisation",
    "fastsafetensors": "it reads onto CUDA devices only",
    "instanttensor": "it reads onto CUDA devices only",
    "ipc_cache": "it maps the memory of CUDA devices",
    "modelexpress": "it has never been tried with quantised layers of this package",
    "gguf": "GGUF files carry a quantisation of their own",
    "bitsandbytes": "it quantises float weights, and these are quantised already",
}


def check(load_format: str, ours: bool, model: str) -> None:
    """Refuse, before anything is read, a load format that cannot work, or that is not the folder's.

    Args:
        load_format: as the user gave it.
        ours: whether the model is in one of our formats.
        model: the model's folder or name.

    Raises:
        LimitError: for a load format that does not work with these checkpoints.
        CheckpointError: for a saved state that is to be loaded as a checkpoint, or lacks the files that describe it.

    """
    load_format = load_format.lower()
    saved = os.path.isfile(os.path.join(model, STORED))
    if saved and not ours:
        raise CheckpointError(
            f"{model} holds a saved state of a quantised model, but no file that says how it is quantised",
            found=STORED,
            todo="copy the description of the original checkpoint (for msModelSlim's, quant_model_description*.json) "
            "and its config.json into the folder",
        )
    if not ours:
        return
    if saved and load_format not in (*SAVED, DUMMY):
        raise CheckpointError(
            f"{model} holds a saved state, which --load-format {load_format} cannot read",
            found=STORED,
            expected=f"--load-format {' or '.join(SAVED)}",
            todo="give that argument, or name the folder of the original checkpoint",
        )
    if load_format in (*_CHECKPOINT, *SAVED, DUMMY):
        return
    if load_format not in _REFUSED and load_format in compat.loader_names():
        logger.warning(
            "--load-format %s is unknown to vllm-ascend-quant: what it loads is checked as usual", load_format
        )
        return
    raise LimitError(
        f"--load-format {load_format} does not work with a quantised checkpoint of this kind",
        found=_REFUSED.get(load_format, "vLLM has no load format of this name"),
        expected=f"one of {', '.join((*_CHECKPOINT, *SAVED, DUMMY))}",
        todo="leave the argument out",
    )


def open_folder(model_config: Any, load_config: Any) -> CheckpointFolder:
    """The folder of vLLM's model as its load format sees it, downloaded if it must be.

    Raises:
        QuantError: as hub.download, or if the folder is no saved state and should be one.

    """
    folder = hub.download(model_config, load_config)
    if load_config.load_format in SAVED:
        return SavedFolder(folder.path)
    if load_config.load_format == DUMMY:
        if folder.files(STORED):
            return SavedFolder(folder.path)
        if not folder.files("*.safetensors"):
            return PlannedFolder(folder.path)
    return folder


def made_up(load_format: str) -> bool:
    """Whether the first weights are made up, so that the values of scales mean nothing."""
    return load_format == DUMMY
