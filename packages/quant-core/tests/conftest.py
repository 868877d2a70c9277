"""What several test modules need: fixtures, and the modules in `support/`, which they can import."""

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("ASCEND_QUANT_TEST_DEVICE") == "npu":
    # By itself torch would import torch_npu and fail with it, and quant_core says why in a warning: see device.refusal.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("quant_core.ops")

import torch
from hypothesis import HealthCheck, settings

from quant_core.machine import processor
from quant_core.ops.cpu import int8_gemm, native

sys.path.insert(0, str(Path(__file__).parent / "support"))
from device import DEVICE, refusal
from workbench import Workbench

# Folders that need torch_npu are run by sessions that name them: pytest then takes them all the same. `schemas` belongs
# to `nox -s test-schemas`, `npu` to `nox -s test-core -- --device npu`, where nothing else is collected.
collect_ignore = ["schemas", "npu"]
if DEVICE == "npu":
    collect_ignore = [path.name for path in Path(__file__).parent.iterdir() if path.name not in ("npu", "conftest.py")]


def pytest_configure() -> None:
    """One message, and no test, where the device that is asked for cannot be had."""
    if reason := refusal():
        raise pytest.UsageError(reason)


# No deadline: the first example of a test pays for imports and for the threads of torch.
# A fixture that forces a product holds for all examples of a test.
unimportant = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("quick", deadline=None, suppress_health_check=unimportant)
settings.register_profile("fuzz", settings.get_profile("quick"), max_examples=5000)  # --hypothesis-profile=fuzz
settings.load_profile("quick")

# The tensors here are tiny: on a busy machine, waiting for a second thread takes many times as long as the work.
torch.set_num_threads(1)


RIGHT_CANDIDATES = [c for c in int8_gemm.CANDIDATES if int8_gemm.refusal(c) is None]


def pytest_report_header() -> list[str]:
    """Results depend on the processor, or on the one that it stands for (`nox -s test-core -- --isa avx2`)."""
    found = processor()
    return [
        f"processor: {found.name}, {found.torch_uses}",
        *(f"{name}: {found}" for name, found in int8_gemm.report().items()),
    ]


@pytest.fixture(scope="session")
def workbench() -> Workbench:
    """Everything between stored tensors and a layer that can be applied."""
    return Workbench()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests draw the same numbers whichever of them run."""
    torch.manual_seed(20240229)


@pytest.fixture(autouse=True)
def forced_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """QUANT_CORE_TEST_GEMM=float32_blocks runs all tests with that candidate."""
    name = os.environ.get("QUANT_CORE_TEST_GEMM")
    if name:
        monkeypatch.setattr(int8_gemm, "choose", lambda rows: getattr(int8_gemm, name))


@pytest.fixture(params=RIGHT_CANDIDATES, ids=lambda candidate: candidate.__name__)
def each_gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forced_gemm: None) -> None:
    """Runs a test with every int8 product that is right on this processor, whichever would be chosen."""
    monkeypatch.setattr(int8_gemm, "choose", lambda rows: request.param)


@pytest.fixture
def compile_afresh() -> Iterator[Callable[..., Any]]:
    """torch.compile without graph breaks and without what other tests compiled."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs code in a process of its own, with packages from these paths; its output and warnings."""

    def run(code: str, *paths: Path) -> str:
        path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(params=["torch", "native"])
def each_pages_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the native code for pages and without; which of the two."""
    path: str = request.param
    operators = native.operators() if path == "native" else None
    if path == "native" and operators is None:
        assert "QUANT_CORE_TEST_NATIVE" not in os.environ, "there is no native code"
        pytest.skip("there is no native code here")
    monkeypatch.setattr(native, "operators", lambda: operators)
    return path
