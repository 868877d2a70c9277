"""What goes wrong in a worker on another node, where no file of the front process can be written (failures.py).

Ray hands an exception of a worker to the process that started it, wrapped in one of its own. What a worker could not
even unpickle arrives as text only: a worker without this package has nothing of ours that could say more.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from quant_core import QuantError
from vllm_ascend_quant.config import AscendQuantizationConfig
from vllm_ascend_quant.plugin.failures import is_ours, leave
from vllm_ascend_quant.versions import VersionsError, listed, packages

#: What Ray writes of an argument that a worker could not unpickle.
_UNREADABLE = re.compile(r"RaySystemError: System error: (.+?)\ntraceback: ", re.DOTALL)
_ADDRESS = re.compile(r"\bip=([^,)\s]+)")


def start_workers(original: Callable[..., None], executor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Start the workers of an engine, on this machine or on others.

    Raises:
        QuantError: what one of them raised, in the place of Ray's error around it.

    """
    try:
        original(executor, vllm_config, *args, **kwargs)
    except Exception as error:
        told = what_a_worker_said(error, vllm_config) if is_ours(vllm_config) else None
        if told is None or told is error:
            raise
        leave(told)
        raise told from error


def what_a_worker_said(error: Exception, vllm_config: Any) -> QuantError | None:
    """The error of ours inside one of an executor, or about what a worker lacks; None if there is none."""
    for inner in _chain(error):
        cause = getattr(inner, "cause", None) or inner  # Ray's wrapper is of both classes, and prints a traceback
        if isinstance(cause, QuantError):
            return cause
    unreadable = _UNREADABLE.search(str(error))
    return None if unreadable is None else _unreadable(unreadable[1], str(error), vllm_config)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unreadable(said: str, whole: str, vllm_config: Any) -> QuantError:
    """The error about a worker that cannot unpickle the configuration."""
    if f".{VersionsError.__name__}: " in whole:
        return VersionsError(said)  # complete, with all its lines
    address = _ADDRESS.search(whole)
    config = vllm_config.quant_config
    needed = packages(config.format_name) if isinstance(config, AscendQuantizationConfig) else packages("")
    return VersionsError(
        "a worker on another node cannot read the configuration of this model",
        where=None if address is None else f"the node with the address {address[1]}",
        found=said,
        expected=f"on every node {listed(needed)}, and the same vLLM",
        todo="install these in the environment that Ray was started from on that node, then start Ray there anew",
    )
