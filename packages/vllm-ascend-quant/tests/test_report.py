"""`python -m vllm_ascend_quant report`, as a user runs it: three processes, of which one imports vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend_quant.reporting import PARTS, Part, Request, collect, text
from vllm_ascend_quant.reporting.machine import SHOWN

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
MODELSLIM = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"
LLM_COMPRESSOR = DATA / "checkpoints" / "llmcompressor" / "qwen3" / "MIXED_W8A8_W4A16"

SECRET = "the-token-of-somebody"
SECRETS = dict.fromkeys(("HF_TOKEN", "VLLM_API_KEY", "ASCEND_PASSWORD", "QUANT_CORE_TOKEN", "MY_KEY"), SECRET)

#: As they are where they were built for something else.
BROKEN = 'raise ImportError("libsomewhere.so: undefined symbol")'


def start(folder: Path, *arguments: object, path: Path | str = "", **variables: str) -> "subprocess.Popen[str]":
    """The command, in a folder; with packages from a path before all others."""
    paths = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **SECRETS, "PYTHONPATH": paths, **variables}
    command = [sys.executable, "-m", "vllm_ascend_quant", "report", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


class Reports:
    """What three runs printed: in a sound environment with models, without vLLM with broken ones, without torch."""

    def __init__(self, folder: Path) -> None:
        for name in ("vllm", "torch"):
            (folder / f"no {name}" / name).mkdir(parents=True)
            (folder / f"no {name}" / name / "__init__.py").write_text(BROKEN)
        (folder / "broken").mkdir()
        (folder / "broken" / "quant_model_description.json").write_text('{"model_quant_type": "W8A8", "a.weight": ')
        (folder / "empty").mkdir()
        off, models = "precedence,modelslim,detcet", (MODELSLIM, LLM_COMPRESSOR)
        runs = {
            "sound": start(folder, "--json", *models, VLLM_ASCEND_QUANT_DISABLE=off),
            "no vLLM": start(folder, "broken", "empty", "absent", path=folder / "no vllm"),
            "no torch": start(folder, "--json", path=folder / "no torch"),
        }
        self.printed: dict[str, str] = {}
        for name, run in runs.items():
            printed, complaints = run.communicate(timeout=180)
            assert (run.returncode, complaints) == (0, "")
            self.printed[name] = printed

    def part(self, run: str, title: str) -> dict[str, Any]:
        """One part of a run that printed JSON."""
        part: dict[str, Any] = json.loads(self.printed[run])[title]
        return part


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return Reports(tmp_path_factory.mktemp("reports"))


def test_every_part_has_an_answer(reports: Reports) -> None:
    found = json.loads(reports.printed["sound"])
    assert list(found) == [*PARTS, f"model {MODELSLIM}", f"model {LLM_COMPRESSOR}"]
    assert [title for title, part in found.items() if "found" not in part] == []
    assert found["versions"]["found"]["torch"]
    assert found["versions that do not fit together"]["found"] == []


def test_who_serves_the_methods(reports: Reports) -> None:
    vllm = reports.part("sound", "vLLM")["found"]
    served = vllm["who serves the methods"]
    assert served["ascend"].startswith("nobody: ")  # it is switched off, and vLLM has none of its own
    assert served["compressed-tensors"].startswith("vllm_ascend_quant.config.AscendCompressedTensorsConfig (")
    assert "CpuPlatform" in vllm["platform"]


def test_formats_and_schemes_say_where_they_come_from(reports: Reports) -> None:
    formats = reports.part("sound", "formats")["found"]
    assert formats["modelslim"]["distribution"].startswith("quant-modelslim ")
    schemes = reports.part("sound", "schemes")["found"]
    (own,) = [types for owner, types in schemes.items() if owner.startswith("quant-core ")]
    assert "W8A8_DYNAMIC" in own["linear"]
    assert "W8A8_DYNAMIC" in own["moe"]


def test_what_is_switched_off_and_what_was_misspelt(reports: Reports) -> None:
    found = reports.part("sound", "switched off")["found"]
    assert found["switched off"] == ["precedence", "modelslim"]
    assert found["named, but nothing is called so"] == ["detcet"]


def test_why_there_is_no_npu(reports: Reports) -> None:
    found = reports.part("sound", "NPUs")["found"]
    assert (found["count"], found["schemes compute on"]) == (0, "cpu")
    assert found["why none can be used"] == "torch_npu is not installed"


def test_a_secret_is_never_printed(reports: Reports) -> None:
    for printed in reports.printed.values():
        assert SECRET not in printed
    variables = reports.part("sound", "environment variables")["found"]
    assert variables["VLLM_API_KEY"] == "(set; its value is not shown)"
    assert variables["VLLM_ASCEND_QUANT_DISABLE"] == "precedence,modelslim,detcet"
    assert "HF_TOKEN" not in variables
    assert [name for name in SHOWN if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASS", "AUTH"))] == []


def test_a_torch_that_cannot_be_imported_costs_what_needs_it(reports: Reports) -> None:
    found = json.loads(reports.printed["no torch"])
    assert list(found) == list(PARTS)
    answered = [title for title, part in found.items() if "found" in part]
    assert answered == list(PARTS)[: list(PARTS).index("import torch")]
    assert "are looked for with TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["import torch"]["error"]
    assert "libsomewhere.so: undefined symbol" in found["NPUs"]["error"]


def test_a_vllm_that_cannot_be_imported_costs_its_own_part(reports: Reports) -> None:
    parts = dict(part.split(" ==\n", 1) for part in f"\n{reports.printed['no vLLM']}".split("\n== ")[1:])
    assert [title for title in PARTS if "ERROR" in parts[title]] == ["vLLM"]
    assert "libsomewhere.so: undefined symbol" in parts["vLLM"]


def test_folders_that_nobody_can_serve(reports: Reports) -> None:
    broken, empty, absent = reports.printed["no vLLM"].split("== model ")[1:]
    assert "\n  files: quant_model_description.json\n" in broken
    assert "not valid JSON: Expecting value: line 1 column" in broken.partition("  formats:\n    modelslim:\n")[2]
    assert "formats: no installed format recognises it" in empty
    assert "ERROR: CheckpointError: absent is neither a folder nor a model in the Hugging Face cache" in absent


def test_decisions_are_counted(reports: Reports) -> None:
    found = reports.part("sound", f"model {MODELSLIM}")["found"]["formats"]["modelslim"]
    assert found["served here"] is False
    assert found["modules"]["W8A8"] == {
        "count": 21,
        "such as": "model.layers.0.mlp.down_proj",
        "because": "quant_model_description.json: model.layers.0.mlp.down_proj.weight = W8A8",
    }
    found = reports.part("sound", f"model {LLM_COMPRESSOR}")["found"]["formats"]["compressed-tensors"]
    assert found["served here"] is True
    assert {"W4A16", "W8A8_DYNAMIC", "FLOAT"} == set(found["modules"])


def misbehaving(code: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the processes that are started from now on run some code first."""
    (folder / "sitecustomize.py").write_text(code)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))


def test_a_part_that_takes_the_process_along_costs_its_own_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    misbehaving("import os, platform\nplatform.libc_ver = os.abort", monkeypatch, tmp_path)
    first, second, third = collect([Request("CANN"), Request("machine"), Request("plugins")])
    assert (first.error, third.error) == ("", "")
    assert second.error == "the process that looked for this was ended by SIGABRT"
    assert "machine.py" in second.said


def test_a_part_that_hangs_costs_its_own_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    misbehaving("import time\ntime.sleep(60)", monkeypatch, tmp_path)
    (found,) = collect([Request("CANN")], patience=0.5)
    assert found.error == "the process that looked for this took longer than 0.5 seconds"


def test_text_of_data() -> None:
    found = {"a": None, "b": {"c": [1, 2], "d": []}, "e": [{"f": True, "g": "two\nlines"}], "h": {}}
    lines = text.of_part(Part("title", found, said="warned")).splitlines()
    assert lines == [
        "== title ==",
        *("  a: not found", "  b:", "    c: 1, 2", "    d: none"),
        *("  e:", "    - f: yes", "      g:", "        two", "        lines", "  h: none"),
        *("  printed meanwhile:", "  | warned"),
    ]
    assert text.of_part(Part("title", error="why")) == "== title ==\n  ERROR: why\n"
