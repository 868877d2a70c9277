"""Quantise the small Qwen3 with the real msModelSlim: ``python quantise_with_msmodelslim.py FOLDER``.

Each recipe gets a folder of its own below FOLDER/msmodelslim-VERSION, written by the tool's own command on a CPU;
nothing in the tool is patched. It needs neither an NPU nor torch_npu for these recipes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from problems import MODEL, calibration_texts


def kind(dtype: str, scope: str, symmetric: bool = True, method: str = "minmax") -> dict[str, Any]:
    """How one side of a product is quantised, in the words of the tool's configuration."""
    return {"dtype": dtype, "scope": scope, "symmetric": symmetric, "method": method}


#: Activations and weights of all linear layers of the blocks.
RECIPES = {
    "W8A8": (kind("int8", "per_tensor", symmetric=False), kind("int8", "per_channel")),
    "W8A8_DYNAMIC": (kind("int8", "per_token"), kind("int8", "per_channel")),
    "W8A16": (kind("float", "per_tensor", method="none"), kind("int8", "per_channel")),
    "W8A8_MXFP8": (kind("mxfp8", "per_block"), kind("mxfp8", "per_block")),
}


def readable_model(folder: Path) -> Path:
    """The model with a tokenizer class that transformers 4 knows, which msModelSlim asks for; ours is of 5."""
    model = Path(shutil.copytree(MODEL, folder / "model"))
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def configuration(texts: Path, act: dict[str, Any], weight: dict[str, Any]) -> str:
    """One recipe as the tool reads it: YAML, of which JSON is a part. A part_file_size of 0 is one file."""
    process = {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}}
    save = {"type": "ascendv1_saver", "part_file_size": 0}
    return json.dumps(
        {"apiversion": "modelslim_v1", "spec": {"process": [process], "save": [save], "dataset": str(texts)}}
    )


def quantise(model: Path, out: Path, model_type: str, *recipe: str) -> None:
    """Run the tool's command, as someone without an NPU does; beside the model, because it leaves a file behind."""
    command = [sys.executable, "-m", "msmodelslim.cli", "quant", "--device", "cpu", "--model_type", model_type]
    command += ["--model_path", str(model), "--save_path", str(out), "--trust_remote_code", "False", *recipe]
    subprocess.run(command, check=True, cwd=model.parent)


def main(folder: Path) -> None:
    """Write all checkpoints."""
    out = folder / f"msmodelslim-{version('msmodelslim')}"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        model, texts = readable_model(work), work / "texts.json"
        texts.write_text(json.dumps(calibration_texts()))
        for recipe, (act, weight) in RECIPES.items():
            file = work / f"{recipe}.yaml"
            file.write_text(configuration(texts, act, weight))
            quantise(model, out / recipe, "Qwen3-8B", "--config_path", str(file))
        # The recipe that the tool ships for Qwen3-14B, with the texts that it ships: outliers are moved into norms, the
        # ten layers that suffer most stay in float. It does not ask how large the model is.
        quantise(model, out / "w8a8_of_Qwen3-14B", "Qwen3-14B", "--quant_type", "w8a8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
