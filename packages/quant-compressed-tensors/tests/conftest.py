"""What several test modules need; those in `support/` can be imported."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "support"))

# The same examples in every run; `nox -s fuzz` (--hypothesis-profile=fuzz) draws thousands of others. No deadline: the
# first example of a test pays for imports.
unimportant = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", deadline=None, derandomize=True, database=None, max_examples=200, suppress_health_check=unimportant
)
settings.register_profile("fuzz", deadline=None, max_examples=5000, suppress_health_check=unimportant)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny: threads would only wait for each other, long if the machine is busy."""
    torch.set_num_threads(1)
