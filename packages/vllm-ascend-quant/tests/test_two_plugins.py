"""Faults of other people's packages: they are told where they matter, and every other model starts."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import named_models

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
MODEL = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"

SCHEME = """
from quant_core import register_scheme
from quant_core.schemes.linear.w8a8 import AscendW8A8LinearMethod

@register_scheme("W1A1", "linear")
class Scheme(AscendW8A8LinearMethod):
    pass
"""
FORMAT = """
from quant_core import Detection, QuantFormat

class Format(QuantFormat):
    name = "{name}"
    vllm_name = "shared"

    @classmethod
    def detect(cls, folder):
        return Detection(cls.name, "it is marked") if folder.files("marked-by-{name}") else None
"""


def install(site: Path, group: str, name: str, source: str, value: str) -> None:
    """A stand-in for a distribution that somebody installed: a module and its entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (site / f"{name}.py").write_text(source)


def installed(site: Path, group: str, source: str, attribute: str) -> None:
    for name in ("stranger_one", "stranger_two"):
        install(site, group, name, source.replace("{name}", name), name + attribute)


def of_type(quant_type: str, folder: Path) -> Path:
    """A copy of the checkpoint whose layers are of another type."""
    shutil.copytree(MODEL, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    file = folder / "quant_model_description.json"
    types = {key: quant_type if said == "W8A8" else said for key, said in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(types))
    return folder


def test_two_schemes_that_claim_one_type(tmp_path: Path) -> None:
    """Only a checkpoint of that type is refused, with the names of both packages."""
    installed(tmp_path / "site", "quant_core.schemes", SCHEME, "")
    steps = {
        "float": {"model": str(DATA / "models" / "qwen3")},
        "ours": {"model": str(MODEL)},
        "disputed": {"model": str(of_type("W1A1", tmp_path / "disputed"))},
    }
    found = named_models.run(steps, "http://127.0.0.1:9", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert [found[step].get("method") for step in ("float", "ours")] == [None, "ascend"]
    message = found["disputed"]["error"]
    assert message.startswith("RegistrationError: two schemes claim 'W1A1' on linear layers")
    assert "stranger_one" in message
    assert "stranger_two" in message


def test_two_formats_that_claim_one_method(tmp_path: Path) -> None:
    """Only a folder that one of them recognises is refused."""
    installed(tmp_path / "site", "quant_core.formats", FORMAT, ":Format")
    marked = tmp_path / "marked"
    shutil.copytree(DATA / "models" / "qwen3", marked, copy_function=shutil.copyfile)
    marked.chmod(0o755)
    (marked / "marked-by-stranger_two").touch()
    steps = {"float": {"model": str(DATA / "models" / "qwen3")}, "ours": {"model": str(MODEL)}}
    steps["disputed"] = {"model": str(marked)}
    found = named_models.run(steps, "http://127.0.0.1:9", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert [found[step].get("method") for step in ("float", "ours")] == [None, "ascend"]
    message = found["disputed"]["error"]
    assert message.startswith("RegistrationError: two formats claim vLLM's method 'shared'")
    assert "stranger_one" in message
    assert "stranger_two" in message


@pytest.mark.parametrize("group", ["quant_core.schemes", "quant_core.formats"])
def test_a_package_that_cannot_be_imported(group: str, tmp_path: Path) -> None:
    """Everybody's models start; the error for a type that nobody registered names the package that may be the cause."""
    install(tmp_path / "site", group, "broken_stranger", "import nothing_of_this_name", "broken_stranger")
    steps = {
        "float": {"model": str(DATA / "models" / "qwen3")},
        "ours": {"model": str(MODEL)},
        "unknown": {"model": str(of_type("W1A1", tmp_path / "unknown"))},
    }
    found = named_models.run(steps, "http://127.0.0.1:9", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert [found[step].get("method") for step in ("float", "ours")] == [None, "ascend"]
    assert "no scheme serves the quantisation type 'W1A1'" in found["unknown"]["error"]
    assert ("broken_stranger" in found["unknown"]["error"]) == (group == "quant_core.schemes")
