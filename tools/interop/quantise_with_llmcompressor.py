"""Quantise the small Qwen3 with the real llm-compressor: ``python quantise_with_llmcompressor.py FOLDER``.

Each recipe gets a folder of its own below FOLDER/llmcompressor-VERSION, as llm-compressor's own functions write it.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from problems import MODEL, calibration_texts

#: What QuantizationModifier is told beside what it must leave in float. Only static activations need calibration.
ONESHOT: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8", "targets": "Linear"},
    "W8A8_STATIC": {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "channel"},
                "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
            }
        }
    },
    "W4A16": {"scheme": "W4A16", "targets": "Linear"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC", "targets": "Linear"},
}

#: What model_free_ptq is told, which rewrites files without a model: it leaves the patterns in config.json as they are.
MODEL_FREE: dict[str, dict[str, Any]] = {
    "W8A8_MODEL_FREE": {"scheme": "W8A8", "ignore": ["lm_head", "re:.*embed_tokens$", "re:.*down_proj$"]},
}


def main(folder: Path) -> None:
    """Write all checkpoints."""
    out = folder / f"llmcompressor-{version('llmcompressor')}"
    texts = Dataset.from_dict({"text": calibration_texts()})
    for name, settings in ONESHOT.items():
        recipe = QuantizationModifier(ignore=["lm_head"], **settings)
        # A dataset would be run through the model for every recipe, needed or not, in an order of chance.
        data = {"dataset": texts, "shuffle_calibration_samples": False} if "config_groups" in settings else {}
        oneshot(model=str(MODEL), recipe=recipe, output_dir=str(out / name), **data)
    for name, settings in MODEL_FREE.items():
        model_free_ptq(str(MODEL), str(out / name), device="cpu", **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
