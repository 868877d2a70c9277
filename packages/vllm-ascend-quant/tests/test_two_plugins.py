"""Two installed packages that claim one name: vLLM stops before it builds anything, and says which two they are."""

import os
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
from quant_core import QuantFormat

class Format(QuantFormat):
    name = "{name}"
    vllm_name = "shared"
"""


def install(site: Path, group: str, name: str, source: str, value: str) -> None:
    """A stand-in for a distribution that somebody installed: a module and its entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (site / f"{name}.py").write_text(source)


@pytest.mark.parametrize(
    ("group", "source", "attribute", "told"),
    [
        ("quant_core.schemes", SCHEME, "", "W1A1"),
        ("quant_core.formats", FORMAT, ":Format", "two formats claim vLLM's method 'shared'"),
    ],
)
def test_two_packages_that_claim_one_name(group: str, source: str, attribute: str, told: str, tmp_path: Path) -> None:
    for name in ("stranger_one", "stranger_two"):
        install(tmp_path / "site", group, name, source.replace("{name}", name), name + attribute)
    found = named_models.run(
        {"start": {"model": str(MODEL)}}, "http://127.0.0.1:9", tmp_path, PYTHONPATH=str(tmp_path / "site")
    )
    message = found["start"]["error"]
    assert message.startswith("RegistrationError: ")
    assert told in message
    assert "stranger_one" in message
    assert "stranger_two" in message
