"""What went wrong in a worker, raised again in the front process, where a user looks.

vLLM tells the front process only that its engine did not start ("Engine core initialization failed"); the cause stands
in the output of some other process, many lines above. So the front process names a file to the engine's processes, by
an environment variable that they inherit. An error of ours is left in it, and takes the place of vLLM's.
"""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from vllm.logger import init_logger

from quant_core import QuantError
from vllm_ascend_quant import installed
from vllm_ascend_quant.config import AscendQuantizationConfig

logger = init_logger("vllm.ascend_quant")

#: Names the file to the processes of an engine.
VARIABLE = "VLLM_ASCEND_QUANT_FAILURE"


def start_engines(original: Callable[..., None], manager: Any, *args: Any, **kwargs: Any) -> None:
    """Start the processes of an engine for a model of ours, with a file for what goes wrong in them.

    `wait_for_engines` reads it.
    """
    if not any(map(is_ours, (*args, *kwargs.values()))):
        return original(manager, *args, **kwargs)
    before = os.environ.get(VARIABLE)
    manager.ascend_quant_failure = Path(tempfile.mkdtemp(prefix="vllm-ascend-quant-")) / "failure"  # for this user only
    os.environ[VARIABLE] = str(manager.ascend_quant_failure)
    try:
        original(manager, *args, **kwargs)
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
    return None


def is_ours(config: Any) -> bool:
    """Whether this is vLLM's configuration of a model that we serve, or of one with a draft of ours."""
    speculative = getattr(config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return isinstance(getattr(config, "quant_config", None), AscendQuantizationConfig) or (
        getattr(draft, "quantization", None) in installed.methods()
    )


def load_model(original: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Load a model in a worker; an error of ours is left to the front process, if it has named a file."""
    try:
        return original(*args, **kwargs)
    except QuantError as error:
        leave(error)
        raise


def leave(error: QuantError) -> None:
    """Leave an error of ours to the front process, if it has named a file."""
    if file := os.environ.get(VARIABLE):
        part = Path(f"{file}.{os.getpid()}")
        try:
            part.write_bytes(pickle.dumps(error))
            part.replace(file)  # whole, whichever rank was first
        except OSError as problem:  # a worker on another machine has no such folder; see remote.py
            logger.info("the front process is not told: %s", problem)


def wait_for_engines(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wait for an engine's processes.

    Raises:
        QuantError: what one of them raised, in the place of vLLM's RuntimeError.

    """
    managers = [getattr(argument, "engine_manager", argument) for argument in (*args, *kwargs.values())]
    files = [m.ascend_quant_failure for m in managers if hasattr(m, "ascend_quant_failure")]
    try:
        original(*args, **kwargs)
    except RuntimeError as error:
        for file in files:
            if file.exists():
                raise pickle.loads(file.read_bytes()) from error
        raise
    finally:
        for file in files:
            shutil.rmtree(file.parent, ignore_errors=True)
