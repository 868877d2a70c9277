"""The model that is quantised, and the problems of testdata/models: some are asked, others calibrate."""

import json
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "testdata" / "models"
MODEL = MODELS / "qwen3"
ASKED = 200  # the first ones, as in examples/demo and in testdata/checkpoints/reference.json


def _all() -> list[dict[str, str]]:
    return [json.loads(line) for line in (MODELS / "eval.jsonl").read_text().splitlines()]


def asked() -> list[dict[str, str]]:
    """The problems whose answers are judged."""
    return _all()[:ASKED]


def calibration_texts() -> list[str]:
    """Texts of eight solved problems each, as the model was trained on; none of them is asked later."""
    solved = [problem["prompt"] + problem["answer"] for problem in _all()[ASKED:]]
    return ["".join(solved[start : start + 8]) for start in range(0, len(solved), 8)]
