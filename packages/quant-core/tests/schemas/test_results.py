"""Our CPU kernels beside torch_npu's operators compute what they compute without it."""

from collections.abc import Callable
from pathlib import Path

import torch

SUPPORT = Path(__file__).parents[1] / "support"

COMPUTE = """
import sys, torch
{first}
import computation, quant_core.ops
torch.save(computation.results(), {file!r})
print("status:", quant_core.ops.torch_npu_status)
"""


def test_results_are_the_same_bits_with_and_without_torch_npu(tmp_path: Path, run_python: Callable[..., str]) -> None:
    files = [str(tmp_path / "beside"), str(tmp_path / "alone")]
    assert "status: torch_npu 2.13." in run_python(COMPUTE.format(first="", file=files[0]), SUPPORT)
    hidden = "sys.modules['torch_npu'] = None"  # Python then finds no such package
    said = run_python(COMPUTE.format(first=hidden, file=files[1]), SUPPORT)
    assert "status: torch_npu is not installed" in said
    beside, alone = (torch.load(file) for file in files)
    assert beside.keys() == alone.keys()
    for label, tensors in beside.items():
        for a, b in zip(tensors, alone[label], strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), label
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), label
