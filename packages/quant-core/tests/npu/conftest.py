"""Tests on a real NPU, which ASCEND_QUANT_TEST_DEVICE=npu asks for. Its answers are printed at the end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, on_npu
from operator_calls import operator_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from quant_core.devices import current_device
from quant_core.machine import npus

ANSWERS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE != "npu":
        raise pytest.UsageError("these tests need a real NPU: `nox -s test-core -- --device npu` runs them")
    config.stash[ANSWERS] = []
    config.addinivalue_line("filterwarnings", "default")  # torch_npu warns of much that is not ours to repair


def pytest_report_header() -> str:
    found = npus()
    return f"NPUs: {len(found.names)} x {found.names[0]}, taken for a {found.product}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("what this NPU answered (please send it to us, with `python -m vllm_ascend_quant report`)")
    for line in config.stash[ANSWERS]:
        terminalreporter.line(line)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Keeps an answer for the end of the run. One that our CPU kernel does not give fails: the kernel is to follow."""
    question = str(request.node.function.__doc__).split("\n")[0]

    def keep(answer: str, ours: str) -> None:
        differs = "" if answer == ours else f", while our CPU kernel answers: {ours}"
        request.config.stash[ANSWERS].append(f"{current_device()}: {question} {answer}{differs}")
        assert answer == ours

    return keep


@pytest.fixture
def ask() -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """Calls an operator on the NPU and on CPU; the tensors that both return, on CPU.

    Of an operator that returns nothing, its arguments: it writes into some of them.
    """

    def call(name: str, *arguments: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        operator, theirs = operator_of(name), on_npu((arguments, options))
        ours = tree_map_only(Tensor, torch.clone, arguments)
        found, expected = operator(*theirs[0], **theirs[1]), operator(*ours, **options)
        if expected is None:
            found, expected = theirs[0], ours
        return [tensor.cpu() for tensor in _tensors(found)], _tensors(expected)

    return call


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
