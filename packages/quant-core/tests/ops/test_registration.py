"""Importing quant_core beside a torch_npu that works, and one that does not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant_core import ops

USE = """
import quant_core, torch
x = torch.randn(3, 8)
codes, scales = torch.ops.npu.npu_dynamic_quant(x)
eye, ones = torch.eye(8, dtype=torch.int8), torch.ones(8)
y = torch.ops.npu.npu_quant_matmul(codes, eye, ones, pertoken_scale=scales, output_dtype=torch.float32)
assert torch.allclose(x, y, atol=float(scales.max()) / 2 * 1.001)
print("status:", quant_core.ops.torch_npu_status)
"""

BROKEN = '''"""A stand-in for torch_npu: it is installed and cannot be imported, as the real one without CANN."""

raise {error}
'''

WORKING = '''"""A stand-in for torch_npu: as in the real one, an operator has a Meta kernel and none for CPU."""

import torch

__version__ = "2.13.0"
library = torch.library.Library("npu", "DEF")
library.define(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, "
    "int dtype, int axis=1, bool div_mode=True) -> Tensor"
)
library.define("npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor")
library.impl("npu_quantize", lambda input, *_: input.new_empty((1, 2, 3)), "Meta")
library.impl("npu_trans_quant_param", lambda scale, *_: scale + 1, "CPU")
'''


@pytest.fixture
def torch_npu(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a package called torch_npu; the folder that holds it."""

    def write(source: str) -> Path:
        package = tmp_path / "site" / "torch_npu"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        return package.parent

    return write


@pytest.mark.parametrize(
    "error",
    [
        'ImportError("libhccl.so: cannot open shared object file")',
        'AttributeError("module torch._C has no attribute _something")',  # made for another torch
    ],
)
def test_a_torch_npu_that_cannot_be_imported_counts_as_absent_and_is_reported(
    error: str, torch_npu: Callable[[str], Path], run_python: Callable[..., str]
) -> None:
    said = run_python(USE, torch_npu(BROKEN.format(error=error)))
    reason = error.split('"')[1]
    assert f"status: torch_npu is installed but cannot be imported: {reason}" in said
    assert f"UserWarning: torch_npu is installed but cannot be imported ({reason})" in said
    assert "uninstall torch_npu" in said


def test_what_torch_npu_has_is_not_replaced(torch_npu: Callable[[str], Path], run_python: Callable[..., str]) -> None:
    code = (
        USE
        + """
npu = torch.ops.npu
assert npu.npu_quantize(torch.ones(1, 2), torch.tensor([0.5]), None, torch.qint8, -1).tolist() == [[2, 2]]
shape = npu.npu_quantize(torch.ones(1, 2, device="meta"), torch.tensor([0.5], device="meta"), None, torch.qint8).shape
assert shape == (1, 2, 3), "torch_npu's Meta kernel was replaced"
assert npu.npu_trans_quant_param(torch.zeros(1)).tolist() == [1.0], "torch_npu's CPU kernel was replaced"
"""
    )
    assert "status: torch_npu 2.13.0" in run_python(code, torch_npu(WORKING))


def test_without_torch_npu_nothing_is_warned(run_python: Callable[..., str]) -> None:
    if ops.torch_npu_status != "torch_npu is not installed":
        pytest.skip("torch_npu is installed here")
    assert run_python(USE).strip() == "status: torch_npu is not installed"
