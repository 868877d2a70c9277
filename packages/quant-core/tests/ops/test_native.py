"""Native code is compiled once, at first use, and does without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quant_core.ops.cpu import native

USE = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
import quant_core.ops
torch.set_num_threads(1)
both, ones = torch.zeros(2, 1, 32, 32, dtype=torch.int8), torch.ones(1, 32)
new = torch.full((2, 1, 32), 3.4)
operators = torch.ops.quant_core
for _ in range(2):
    operators.quantize_to_pages(new, new, both[:, :, :16], both[:, :, 16:], ones, None, ones, None, torch.arange(2))
table, starts, lengths = (torch.tensor(v, dtype=torch.int32) for v in ([[0]], [0, 2], [2]))
out = torch.zeros_like(new)
pages = both[:, :, :16], both[:, :, 16:], ones, None, ones, None
operators.attend_pages(new, *pages, table, starts, lengths, 1.0, True, -1, 0.0, None, None, out)
assert (out == 3).all(), out
from quant_core.ops.cpu import native
print("native:", native.operators() is not None)
"""

#: Counts its calls, then compiles; or fails.
COUNTING = '#!/bin/sh\necho call >> "$COUNT"\nsleep 1\nexec c++ -O0 "$@" -O0\n'
FAILING = "#!/bin/sh\necho 'pages.cpp:1: error: this machine is out of order' >&2\nexit 1\n"

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler here")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that uses the operators, with a folder of extensions of its own."""

    def start(compiler: str, **variables: str) -> subprocess.Popen[str]:
        script = tmp_path / "compiler"
        if not script.exists():
            script.write_text(compiler)
            script.chmod(0o755)
        added = {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(tmp_path / "kept"), "COUNT": str(tmp_path / "count")}
        environment = {**os.environ, **added, **variables}
        command = [sys.executable, "-c", USE]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    return start


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


@needs_compiler
def test_processes_that_come_at_once_compile_once(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    texts = [said(process) for process in [run(COUNTING) for _ in range(3)]]
    assert [re.findall("native: (.+)|WARNING", text) for text in texts] == [["True"]] * 3
    assert (tmp_path / "count").read_text().splitlines() == ["call"]
    assert said(run(COUNTING)).strip() == "native: True"
    assert (tmp_path / "count").read_text().splitlines() == ["call"], "what is kept is found again"
    kept = {file.suffix for file in (tmp_path / "kept" / "quant_core").iterdir()}
    assert kept == {".so", ".lock"}, "nothing else is left behind"


def test_a_compiler_that_fails_is_named_once_and_torch_serves(run: Callable[..., subprocess.Popen[str]]) -> None:
    text = said(run(FAILING))
    assert "native: False" in text
    assert text.count("WARNING") == 1
    assert "this machine is out of order" in text
    assert "several times slower" in text


def test_without_a_compiler_torch_serves(run: Callable[..., subprocess.Popen[str]]) -> None:
    text = said(run(FAILING, CXX="/nowhere/c++"))
    assert "native: False" in text
    assert text.count("WARNING") == 1
    assert "/nowhere/c++" in text


def test_it_can_be_switched_off(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    text = said(run(FAILING, QUANT_CORE_NATIVE="0"))
    assert "native: False" in text
    assert "WARNING" not in text
    assert not (tmp_path / "kept").exists()


def test_nothing_is_compiled_at_import(run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert run_python("import quant_core.ops").strip() == ""


def test_libraries_differ_by_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for capability in ("AVX512", "AVX2", "DEFAULT", "NO AVX"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        chosen = native.flags()
        assert ("-mavx512f" in chosen) == (capability == "AVX512")
        assert ("-mavx2" in chosen) == (capability in ("AVX512", "AVX2"))
        assert not any("march" in flag for flag in chosen)
        keys.add(native._key(chosen))
    assert len(keys) == 3


@pytest.mark.usefixtures("each_pages_path")
class TestProbe:
    """What computes something else is refused."""

    def test_the_right_ones(self, each_pages_path: str) -> None:
        if each_pages_path == "native":
            assert native.refusal(native.operators()) is None

    @pytest.mark.parametrize("wrong", ["attend", "quantize_to_pages"])
    def test_wrong_ones(self, each_pages_path: str, wrong: str) -> None:
        if each_pages_path == "torch":
            pytest.skip("there is nothing to be wrong")
        loaded = native.operators()

        def attend(*arguments: Any) -> None:
            loaded.attend(*arguments)
            arguments[-2][0, 0, 0] += 1e-3

        def quantize_to_pages(*arguments: Any) -> None:
            loaded.quantize_to_pages(*arguments)
            arguments[2].view(torch.uint8)[0, 0, 0, 0] ^= 1

        functions = {"attend": loaded.attend, "quantize_to_pages": loaded.quantize_to_pages}
        functions[wrong] = {"attend": attend, "quantize_to_pages": quantize_to_pages}[wrong]
        assert "wrong" in (native.refusal(SimpleNamespace(**functions)) or "")


def test_its_status_is_told_without_compiling_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    assert native.status() == f"not compiled yet: at first use, by {sys.executable}"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.status() == "there is no compiler 'no-such-compiler' (CXX)"
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.status() == f"switched off by {native.SWITCH}=0"
    assert list(tmp_path.iterdir()) == []
