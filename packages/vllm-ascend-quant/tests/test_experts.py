"""Real checkpoints with quantised experts, served by real vLLM, judged by the reference's rule."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_core import get_scheme_class

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
MSMODELSLIM = DATA / "checkpoints" / "msmodelslim"


def described(folder: Path) -> dict[str, str]:
    """The weights of a folder's description, and their types."""
    (file,) = folder.glob("quant_model_description*.json")
    content = json.loads(file.read_text())
    return {key: value for key, value in content.items() if key.endswith(".weight")}


def expert_checkpoints() -> list[str]:
    """Keys of the folders whose layers are all served."""
    found = []
    for folder in sorted(p for model in ("deepseek-v3", "qwen3-moe") for p in (MSMODELSLIM / model).glob("*")):
        types = {(t, "moe" if ".experts." in key else "linear") for key, t in described(folder).items() if t != "FLOAT"}
        if all(get_scheme_class(*kind) for kind in types) and "FAKQUANT" not in folder.name:
            found.append(str(folder.relative_to(DATA / "checkpoints")))
    return found


def test_there_is_something_to_serve() -> None:
    """A wrong data folder must not pass as an empty list of cases."""
    assert {key.split("/")[1] for key in expert_checkpoints()} == {"deepseek-v3", "qwen3-moe"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", expert_checkpoints())
def test_equal_to_the_reference(
    key: str, dtype: str, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """No argument tells vLLM how the folder is quantised; the numbers are those of the reference."""
    with start_engine(DATA / "checkpoints" / key, dtype=dtype) as llm:
        results = ask(llm, reference.prompts)
    verdict = reference.judge(key, results, dtype)
    assert verdict["ok"], verdict["why"]
