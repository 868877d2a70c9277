"""Serve what the tools wrote in real vLLM, beside the float model: ``python serve.py FOLDER``.

FOLDER has a folder TOOL-VERSION for each tool, and in it one for each checkpoint. For every checkpoint this prints what
each layer was served as and how many problems it answers. It fails if one is not served, if it is served by vLLM itself
though a package of ours announces its format, or if its accuracy falls too far below the float model's.
"""

import gc
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from problems import MODEL, MODELS, asked
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(MODELS.parents[1] / "examples" / "demo"))
import demo
import show

#: The package of ours that serves what a tool writes, as soon as it announces a format.
PACKAGES = {"llmcompressor": "quant_compressed_tensors", "msmodelslim": "quant_modelslim"}


def announced() -> set[str]:
    """The packages whose formats are installed."""
    from quant_core import list_formats

    return {found.__module__.partition(".")[0] for found in list_formats().values()}


def served_layers(model: demo.Served) -> tuple[bool, dict[str, Any]]:
    """Whether it is ours that serves, and what was decided about each layer, by its path in the model."""
    from vllm_ascend_quant.config import AscendQuantizationConfig

    config = model.settings.quant_config
    if isinstance(config, AscendQuantizationConfig):
        return True, dict(config.layers)
    classes = model.llm.apply_model(_classes)[0]
    return False, {path: SimpleNamespace(quant_type=name, modules=(), evidence=()) for path, name in classes.items()}


def _classes(model: Any) -> dict[str, str | None]:
    """What vLLM itself computes each linear layer with; None stands for float, as it does with us."""
    from vllm.model_executor.layers.linear import LinearBase

    linear = {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}
    names = {path: type(getattr(layer, "scheme", layer.quant_method)).__name__ for path, layer in linear.items()}
    return {path: None if name == "UnquantizedLinearMethod" else name for path, name in names.items()}


def accuracy(model: demo.Served, problems: demo.Problems) -> float:
    """The share of problems that are answered exactly, measured as the demo does."""
    model.answer(problems, timed=False)
    return model.right(problems) / len(problems)


def judge(console: Console, folder: Path, problems: demo.Problems, before: float) -> tuple[bool, list[str]]:
    """Serve one checkpoint and print what happened; whether all is well, and what the last table says of it."""
    package = PACKAGES[folder.parent.name.partition("-")[0]]
    model = demo.load(str(folder), "auto")
    ours, layers = served_layers(model)
    console.print(show.layer_table(layers, every_layer=False))
    types = Counter(quant.quant_type or "FLOAT" for quant in layers.values())
    reasons = []
    if not ours and package in announced():
        reasons.append(f"{package} announces a format, but vLLM itself serves the checkpoint.")
    if set(types) <= {"FLOAT"}:
        reasons.append("No layer is quantised.")
    after = accuracy(model, problems)
    for reason in reasons:
        console.print(f"\n[bold red]FAILED[/]: {reason}")
    failed = demo.verdict(console, before, after) or reasons
    kinds = ", ".join(f"{count} {kind}" for kind, count in types.items())
    return not failed, [package if ours else "vLLM itself", kinds, f"{after:.3f}", f"{after - before:+.3f}"]


def attempt(console: Console, folder: Path, problems: demo.Problems, before: float) -> tuple[bool, list[str]]:
    """The same, where a checkpoint that cannot be served does not keep the others from being tried."""
    tool = folder.parent.name.replace("-", " ")
    console.print(f"\n[bold]{tool}: {folder.name}[/]\n")
    try:
        fine, row = judge(console, folder, problems, before)
    except Exception as error:
        traceback.print_exc()
        console.print("[bold red]FAILED[/]:", end=" ")
        console.print(f"{type(error).__name__}: {error}", markup=False)
        fine, row = False, ["nobody", type(error).__name__, "", ""]
    gc.collect()  # an engine holds its KV cache until its cycles are collected
    return fine, [tool, folder.name, *row, "ok" if fine else "FAILED"]


def main(folder: Path) -> int:
    """Serve the float model and then each checkpoint; the exit code."""
    console, log = demo.set_up(threads="1")
    console.width = max(console.width, 132)
    problems = asked()
    before = accuracy(demo.load(str(MODEL), "auto"), problems)
    results = [attempt(console, one, problems, before) for one in sorted(folder.glob("*/*"))]
    table = Table("tool", "checkpoint", "served by", "layers", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("accuracy", justify="right")
    table.add_column("change", justify="right")
    table.add_column("")
    table.add_row("", MODEL.name, "vLLM itself", "float", f"{before:.3f}", "")
    for _, row in results:
        table.add_row(*row)
    console.print(f"\n[bold]All checkpoints: exact answers to {len(problems)} problems[/]\n")
    console.print(table)
    failed = sum(not fine for fine, _ in results)
    console.print(f"\n{len(results) - failed} of {len(results)} checkpoints are served as they must be; log: {log}")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
