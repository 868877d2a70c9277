"""A config that is unpickled where our packages are others, as on another machine."""

import copy
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quant_core import LimitError
from vllm_ascend_quant import AscendModelSlimConfig, __version__
from vllm_ascend_quant.plugin import remote
from vllm_ascend_quant.versions import VersionsError

sys.path.insert(0, str(Path(__file__).parent))  # for the helper beside this file
import environments

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
W8A8 = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"

#: What a worker does with the configuration that it is sent.
UNPICKLE = """
import pickle, sys
try:
    print("format", pickle.load(sys.stdin.buffer).format.name)
except Exception as error:
    print(type(error).__name__, error)
"""


def unpickled(python: Path, config: Any) -> str:
    """What a process of another environment prints about a config."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, sent = [str(python), "-c", UNPICKLE], pickle.dumps(config)
    done = subprocess.run(command, input=sent, capture_output=True, env=env, timeout=300, check=True)
    return done.stdout.decode()


@pytest.mark.parametrize(
    ("without", "versions", "expected"),
    [
        (
            [],
            {"quant_core": "0.0.9"},
            ["VersionsError", "found: quant-core 0.0.9", f"expected: quant-core {__version__}"],
        ),
        (["quant_modelslim"], {}, ["VersionsError", "found: no quant-modelslim", "expected: quant-modelslim 0."]),
        (["quant_compressed_tensors"], {}, ["format modelslim"]),  # which this checkpoint does not need
        (["vllm_ascend_quant"], {}, ["ModuleNotFoundError No module named 'vllm_ascend_quant'"]),
    ],
    ids=["another core", "no format", "an unneeded format", "nothing of ours"],
)
def test_another_environment(
    without: Collection[str],
    versions: Mapping[str, str],
    expected: list[str],
    tmp_path: Path,
    configure: Callable[..., Any],
) -> None:
    python = environments.make(tmp_path / "env", without, versions)
    printed = unpickled(python, configure(W8A8).quant_config)
    assert all(part in printed for part in expected), printed
    assert "VersionsError" not in printed or f"the node {socket.gethostname()} cannot serve" in printed


def test_the_same_process_copies_and_unpickles(configure: Callable[..., Any]) -> None:
    config = configure(W8A8).quant_config
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is AscendModelSlimConfig
        assert other.quant_description == config.quant_description


class RayError(Exception):
    """Stands for an error of Ray, which keeps what a worker raised as its cause."""

    cause: Exception | None = None


#: How Ray 2.60 writes it (tests/nodes has the real ones).
UNREADABLE = """The actor died because of an error raised in its creation task, ray::A.__init__() (pid=7, ip=192.0.2.2)
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: {}
traceback: Traceback (most recent call last):
{}"""


def told(error: Exception) -> Any:
    return remote.what_a_worker_said(error, SimpleNamespace(quant_config=AscendModelSlimConfig()))


def test_what_a_worker_raised_is_taken_out_of_rays_error() -> None:
    error = RayError("much around it")
    error.cause = LimitError("too wide", found="3")
    assert told(error) is error.cause
    assert told(RayError("nothing of ours")) is None


def test_what_a_worker_could_not_unpickle() -> None:
    own = VersionsError("other packages", found="quant-core 0.0.9")
    text = UNREADABLE.format(own, f"vllm_ascend_quant.versions.VersionsError: {own}")
    assert str(told(RayError(text))) == str(own)
    absent = told(RayError(UNREADABLE.format("No module named 'vllm_ascend_quant'", "ModuleNotFoundError: ...")))
    assert isinstance(absent, VersionsError)
    assert "the node with the address 192.0.2.2" in str(absent)
    assert "found: No module named 'vllm_ascend_quant'" in str(absent)
    assert f"vllm-ascend-quant {__version__}, quant-core" in str(absent)
