"""Tests against the real torch_npu, in a process that can import it: `nox -s test-schemas`."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from quant_core import ops

if not ops.torch_npu_status.startswith("torch_npu 2.13."):
    raise pytest.UsageError(f"{ops.torch_npu_status}; `nox -s test-schemas` runs these tests")


@dataclass(frozen=True)
class Operator:
    """What torch_npu registers for an operator."""

    schema: str
    has_meta: bool


ASK_TORCH_NPU = """
import torch, torch_npu
for schema in map(str, torch._C._jit_get_all_schemas()):
    name = schema.partition("(")[0]
    if name.startswith("npu::"):
        print("Operator", torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), schema)
"""


@pytest.fixture(scope="session")
def real(run_python: Callable[..., str]) -> dict[str, Operator]:
    """All operators of torch_npu in a process without quant_core, which adds what torch_npu lacks."""
    lines = [line.split(" ", 2) for line in run_python(ASK_TORCH_NPU).splitlines() if line.startswith("Operator ")]
    return {
        schema.partition("(")[0].removeprefix("npu::"): Operator(schema, has_meta == "True")
        for _, has_meta, schema in lines
    }
