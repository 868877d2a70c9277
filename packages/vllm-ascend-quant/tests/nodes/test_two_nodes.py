"""vLLM's Ray executor over two real nodes of Ray on this machine, judged by its multiprocessing executor.

vLLM's CPU platform names no resource of Ray, so that nothing runs there, quantised or not; the first test shows it. The
others add that one word (npu_resource.py). All else is vLLM's: its Ray executor, whose actors get the configuration by
Ray's pickling, its queues over TCP, and Gloo over TCP between the ranks.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside the other tests
sys.path.insert(0, str(Path(__file__).parent))  # and beside this file
import cluster
import environments
import ranks

from vllm_ascend_quant import __version__

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[4] / "testdata")
CHECKPOINTS = DATA / "checkpoints"
STATIC = CHECKPOINTS / "msmodelslim" / "qwen3" / "W8A8"
PROMPTS = [[1, *range(20, 60)], [1, *range(300, 320)]]

pytestmark = pytest.mark.xdist_group("engines of several processes")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nodes and engines share."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_COLOR_PREFIX": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that names a resource."""
    cluster.install_platform(tmp_path / "site")
    found = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *filter(None, [found])]))


@pytest.fixture
def nodes() -> Iterator[Callable[..., None]]:
    """`nodes(python_of_the_second=..., slots=...)` starts a cluster, which engines then find."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:

        def start(second: str = sys.executable, slots: int = 1) -> None:
            patch.setenv("RAY_ADDRESS", stack.enter_context(cluster.two_nodes(sys.executable, second, slots)))

        yield start


def over_ray(folder: Path, **options: Any) -> ranks.Engine:
    return ranks.Engine(folder, PROMPTS, distributed_executor_backend="ray", **options)


def last_error(printed: str) -> str:
    """What the front process says: its own traceback comes last."""
    error = printed.rpartition("Traceback (most recent call last):")[2]
    assert "Engine core initialization failed" not in error.partition("The above exception")[0]
    return error


def test_vllms_cpu_platform_has_no_word_for_ray(nodes: Callable[..., None]) -> None:
    """Not with an unquantised model either."""
    nodes()
    printed = over_ray(DATA / "models" / "qwen3", tensor_parallel_size=2).output()
    assert "ValueError: current platform cpu does not support ray." in printed


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    "options",
    # Eager mode does not know pipelines on CPU, for any model.
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "enforce_eager": False}],
    ids=["TP 2", "PP 2"],
)
@pytest.mark.parametrize("key", ["msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED", "llmcompressor/qwen3/W8A8_STATIC_ASYM"])
def test_the_numbers_of_the_multiprocessing_executor(
    key: str, options: dict[str, Any], nodes: Callable[..., None]
) -> None:
    expected = ranks.Engine(CHECKPOINTS / key, PROMPTS, distributed_executor_backend="mp", **options).answers()
    nodes()
    found = over_ray(CHECKPOINTS / key, **options).answers()
    assert [one["generated"] for one in found] == [one["generated"] for one in expected]
    for name in ("prompt_logprobs", "generated_logprobs"):
        differences = [np.subtract(f[name], e[name]) for f, e in zip(found, expected, strict=True)]
        assert np.abs(np.concatenate(differences)).max() == 0


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        (
            {"without": ["vllm_ascend_quant"]},
            ["found: No module named 'vllm_ascend_quant'", "the node with the address"],
        ),
        ({"without": ["quant_modelslim"]}, ["found: no quant-modelslim", "expected: quant-modelslim 0."]),
        ({"versions": {"quant_core": "0.0.9"}}, ["found: quant-core 0.0.9", f"expected: quant-core {__version__}"]),
    ],
    ids=["our packages", "the format", "our version"],
)
def test_what_a_node_lacks_is_the_error_of_the_front(
    lacks: dict[str, Any], expected: list[str], tmp_path: Path, nodes: Callable[..., None]
) -> None:
    nodes(second=str(environments.make(tmp_path / "env", **lacks)))
    error = last_error(over_ray(STATIC, tensor_parallel_size=2).output())
    assert "VersionsError: " in error
    for part in (*expected, "what to do: install the"):
        assert part in error


@pytest.mark.usefixtures("platform")
def test_what_a_worker_raises_on_another_machine(nodes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot write the front process's file, which a switch stands for."""
    monkeypatch.setenv("VLLM_ASCEND_QUANT_DISABLE", "noted")
    nodes(slots=2)
    folder = CHECKPOINTS / "msmodelslim" / "qwen3" / "W8A16_GROUP64"
    error = last_error(over_ray(folder, tensor_parallel_size=4).output())
    assert "LimitError: model.layers.0.self_attn.o_proj: weight_scale cannot be cut over 4 tensor-parallel" in error
    assert "use tensor_parallel_size 2" in error
