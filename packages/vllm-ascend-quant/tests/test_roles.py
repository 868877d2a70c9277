"""W8A8_MIX where prefill and decode run on instances of their own: which of its types serves follows the role."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

#: Stores what both types need. The tool writes W8A8_MIX only together with a quantised cache.
KEY = "msmodelslim/qwen3/V0_W8A8_LEGACYNAMES"

STATIC_ONLY = ("input_scale", "input_offset", "quant_bias", "deq_scale")


@pytest.fixture
def relabelled(checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same quantised weights as another type; of W8A8_DYNAMIC without the tensors that it does not have."""

    def make(quant_type: str) -> Path:
        folder = checkpoint(KEY)
        (file,) = folder.glob("quant_model_description*.json")
        content = json.loads(file.read_text())
        described = {key: quant_type if value == "W8A8" else value for key, value in content.items()}
        if quant_type == "W8A8_DYNAMIC":
            described = {key: value for key, value in described.items() if key.rpartition(".")[2] not in STATIC_ONLY}
            for weights in folder.glob("*.safetensors"):
                kept = {name: t for name, t in load_file(weights).items() if name.rpartition(".")[2] not in STATIC_ONLY}
                save_file(kept, weights, metadata={"format": "pt"})
        file.write_text(json.dumps(described))
        return folder

    return make


def transfer(role: str, folder: Path) -> dict[str, Any]:
    """How an instance is told its role; caches would be exchanged by way of a folder."""
    return {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }
    }


@pytest.mark.parametrize(("role", "quant_type"), [("kv_consumer", "W8A8"), ("kv_producer", "W8A8_DYNAMIC")])
def test_the_role_decides(
    role: str,
    quant_type: str,
    relabelled: Callable[[str], Path],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
    tmp_path: Path,
) -> None:
    """A node that only decodes answers as W8A8, one that does not as W8A8_DYNAMIC, to the last bit."""
    with start_engine(relabelled(quant_type).rename(tmp_path / "expected")) as llm:
        expected = ask(llm, reference.prompts)
    mix = relabelled("W8A8_MIX")
    with start_engine(mix, **transfer(role, tmp_path / "caches")) as llm:
        found = ask(llm, reference.prompts)
    assert found == expected
    if quant_type == "W8A8":  # what the checkpoint was written as, so there is a computation of its own
        verdict = reference.judge(KEY, found, "float32")
        assert verdict["ok"], verdict["why"]
    # Where nothing is disaggregated, it is dynamic; and the two types can be told apart.
    with start_engine(mix) as llm:
        assert (ask(llm, reference.prompts) == expected) == (quant_type == "W8A8_DYNAMIC")
