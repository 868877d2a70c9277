"""What a machine has, by its own account and by stand-ins for others."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quant_core import machine, ops

X86 = (
    "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 fma avx512f avx512_vnni amx_int8\n\nprocessor\t: 1\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve\nCPU part\t: 0xd02\n"


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        (X86, ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8")),
        (ARM, ("asimd", "asimddp", "i8mm", "sve")),
        ("", ()),
    ],
    ids=["x86-64", "ARM", "no such file"],
)
def test_instruction_sets(text: str, sets: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    if text:
        file.write_text(text)
    found = machine.processor(file)
    assert found.instruction_sets == sets
    assert (found.name == "Some Xeon") == (text == X86)
    assert found.torch_uses == torch.backends.cpu.get_cpu_capability()


def stand_in(monkeypatch: pytest.MonkeyPatch, names: list[str], **more: Any) -> None:
    """A torch_npu that finds devices of these names."""
    functions = {
        "device_count": lambda: len(names),
        "get_device_name": lambda index: names[index],
        "is_available": lambda: bool(names),
    }
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=SimpleNamespace(**(functions | more))))
    monkeypatch.setattr(ops, "torch_npu_status", "torch_npu 2.13.0")


def test_npus_that_torch_npu_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ["Ascend910_9382"] * 2)
    assert machine.npus() == machine.Npus(("Ascend910_9382",) * 2, "910C")


def fails(*_: object) -> int:
    raise RuntimeError("the driver does not answer")


@pytest.mark.parametrize(
    ("names", "more", "problem"),
    [
        ([], {}, "torch_npu 2.13.0 finds no NPU that it can use"),
        (["Ascend910B1"], {"is_available": lambda: False}, "torch_npu 2.13.0 finds no NPU that it can use"),
        (["Ascend7"], {}, "unknown Ascend device 'Ascend7'"),
        ([], {"device_count": fails}, "torch_npu 2.13.0 cannot ask for NPUs: RuntimeError: the driver does not answer"),
    ],
)
def test_why_no_npu_can_be_used(
    names: list[str], more: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, names, **more)
    found = machine.npus()
    assert found.problem.startswith(problem)
    assert found.product == ""


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    assert machine.npus() == machine.Npus(problem=ops.torch_npu_status)


def test_tests_on_an_npu_say_in_one_message_why_there_is_none(run_python: Callable[..., str], tmp_path: Path) -> None:
    """As on a machine with torch_npu and without CANN."""
    (tmp_path / "torch_npu.py").write_text('raise ImportError("libhccl.so: cannot open shared object file")')
    here, settings = Path(__file__).parent, Path(__file__).parents[3] / "pyproject.toml"
    said = run_python(
        "import os, pytest\nos.environ['ASCEND_QUANT_TEST_DEVICE'] = 'npu'\n"
        f"assert pytest.main(['-c', {str(settings)!r}, {str(here)!r}, '-p', 'no:cacheprovider']) == 4",
        tmp_path,
    ).strip()
    assert said.startswith("ERROR: these tests need an NPU, and there is none that can be used: torch_npu is installed")
    assert said.count("libhccl.so") == 1
    assert "source its set_env.sh" in said.splitlines()[-1]
