"""Tests beside the real vllm-ascend, in a process that can import it: `nox -s test-ascend`."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_core import ops

if importlib.util.find_spec("vllm_ascend") is None or not ops.torch_npu_status.startswith("torch_npu 2.10."):
    raise pytest.UsageError(f"{ops.torch_npu_status}, or no vllm-ascend; `nox -s test-ascend` runs these tests")

sys.path.insert(0, str(Path(__file__).parent))  # for platform_model


@pytest.fixture
def checkpoints() -> Path:
    """The folder of all checkpoints."""
    data = os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[4] / "testdata"
    return Path(data) / "checkpoints"


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a process of its own; what it printed."""

    def run(code: str, *arguments: str, **env: str) -> str:
        import platform_model

        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=platform_model.environment() | env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
