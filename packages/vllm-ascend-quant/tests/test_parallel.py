"""Two tensor-parallel ranks in real processes, judged by the numbers of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import answers, engine

if __name__ == "__main__":
    folder, prompts, options = json.loads(sys.stdin.read())
    with engine(folder, tensor_parallel_size=2, **options) as llm:
        print("FOUND" + json.dumps(answers(llm, prompts)))
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("W8A8", {}),
        ("W8A16_GROUP64", {}),
        ("W8A8_DYNAMIC_SHARDED", {"additional_config": {"ascend_quant": {"exact_tp": True}}}),
    ],
)
def test_two_ranks_answer_like_one(name: str, options: dict[str, Any], tmp_path: Path, reference: Any) -> None:
    """Static and weight-only types always, dynamic ones with exact TP: the reference knows no ranks."""
    key = f"msmodelslim/qwen3/{name}"
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parent)],
        input=json.dumps([str(DATA / "checkpoints" / key), reference.prompts, options]),
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    verdict = reference.judge(key, json.loads(lines[0].removeprefix("FOUND")), "float32")
    assert verdict["ok"], verdict["why"]
