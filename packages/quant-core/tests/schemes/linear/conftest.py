"""Stored modules of every linear type in every form, as fixtures."""

from collections.abc import Iterator
from typing import Any

import pytest
from linear_cases import CASES, Case, w8a8, w8a8_dynamic, w8a16

from quant_core.devices import planned_device


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Each of the forms, on its device."""
    case = CASES[request.param]
    with planned_device(case.device):
        yield case


@pytest.fixture(scope="session")
def make() -> dict[str, Any]:
    """The functions that make stored modules, by quantisation type."""
    return {"W8A8": w8a8, "W8A8_DYNAMIC": w8a8_dynamic, "W8A16": w8a16}
