#!/usr/bin/env python3
"""Make this folder again from the project's shared material: ``python testdata/update.py ../shared``.

Everything here is a plain copy, in the layout of its source, so that the same tests run over both folders. Only
``reference.json`` is cut down, to the checkpoints that were copied. Edit the lists below, run, commit the result.
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 26_000_000  # bytes that a clone should have to carry at most

MODELS = ["qwen3", "qwen2"]
CHECKPOINTS = [
    "msmodelslim/qwen3/W8A8",
    "msmodelslim/qwen3/W8A8_FP16",
    "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED",
    "msmodelslim/qwen3/W8A16_ASYM",
    "msmodelslim/qwen3/W8A16_GROUP64",
    "msmodelslim/qwen3/V0_W4A16",
    "msmodelslim/qwen3/V0_W4A8_DYNAMIC_GROUP64",
    "msmodelslim/qwen3/W4A4_FLATQUANT_DYNAMIC",
    "msmodelslim/qwen3/W4A8_MXFP",
    "msmodelslim/qwen3/W4A4_MXFP4_SVD",
    "msmodelslim/qwen3/V0_W8A8_LEGACYNAMES",
    "msmodelslim/qwen3/V0_W8A8_M4",
    "msmodelslim/qwen3/MIXED_LAYERS",
    "msmodelslim/qwen3/W8A8C8_ASYM",
    "msmodelslim/qwen2/W8A8",
    "msmodelslim/qwen2/W8A8_DYNAMIC",
    "msmodelslim/qwen3-moe/W8A8_DYNAMIC",
    "llmcompressor/qwen3/W8A8_DYNAMIC",
    "llmcompressor/qwen3/W8A8_STATIC_ASYM",
    "llmcompressor/qwen3/W4A16_ASYM",
    "llmcompressor/qwen3/W4A16_ACTORDER_GROUP",
    "llmcompressor/qwen3/FP8_BLOCK",
    "llmcompressor/qwen3/NVFP4",
    "llmcompressor/qwen3/MIXED_W8A8_W4A16",
    "llmcompressor/qwen3-moe/W4A8_CHANNEL",
]
FILES = ["models/eval.jsonl", "checkpoints/compare.py", "checkpoints/llmcompressor/assemble.py"]

#: Checkpoints without tensors of their own, all of them; `assemble.py` builds those whose tensors are here.
VARIANTS = "checkpoints/llmcompressor/variants"


def copy(source: Path, name: str) -> None:
    """Copy a file or all files below a folder; their content only, since the source may be read-only."""
    found = [source / name] if (source / name).is_file() else sorted((source / name).rglob("*"))
    for file in filter(Path.is_file, found):
        target = HERE / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        target.chmod(0o644)


def cut_reference(source: Path) -> None:
    """Keep the numbers of the folders that are here; one line per checkpoint, so that a change shows in a diff."""
    reference = json.loads((source / "checkpoints/reference.json").read_text())
    keys = [*(f"float/{model}" for model in MODELS), *CHECKPOINTS, *variants()]
    keys += [key for key in reference["checkpoints"] if key.partition("@")[0] in keys and "@" in key]
    reference["checkpoints"] = {key: reference["checkpoints"][key] for key in keys}
    reference["not_computed"] = {key: why for key, why in reference["not_computed"].items() if key in keys}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in reference.items() if key != "checkpoints"]
    rows = [f'"{key}": {json.dumps(value)}' for key, value in reference["checkpoints"].items()]
    lines.append('"checkpoints": {\n' + ",\n".join(rows) + "\n}")
    (HERE / "checkpoints/reference.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def variants() -> list[str]:
    """The keys of the variants whose tensors are here."""
    sources = {path: json.loads(path.read_text())["weights_from"] for path in (HERE / VARIANTS).rglob("weights.json")}
    here = [path for path, checkpoint in sources.items() if f"llmcompressor/{checkpoint}" in CHECKPOINTS]
    return sorted(f"llmcompressor/{path.parent.relative_to(HERE / VARIANTS)}" for path in here)


def main(source: Path) -> None:
    """Replace the copies below this folder by those of ``source``."""
    for folder in ("checkpoints", "models"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    for name in [*FILES, VARIANTS, *(f"models/{m}" for m in MODELS), *(f"checkpoints/{c}" for c in CHECKPOINTS)]:
        copy(source, name)
    cut_reference(source)
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(f"{size / 1e6:.1f} MB in {HERE}")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT / 1e6:.0f} MB: leave a checkpoint out")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent.parent / "shared").resolve())
