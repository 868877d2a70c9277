"""What the demo prints: six parts, each a function of what demo.py has collected."""

import os
import re
import statistics
from collections import defaultdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def recognition(console: Console, served: Any) -> None:
    """Part 1: how the folder was recognised."""
    from quant_core import CheckpointFolder, detect_formats

    folder = CheckpointFolder.locate(served.folder)
    found = detect_formats(folder) if folder else []
    reasons = [f"{one.reason}, so its format is {one.format}." for one in found]
    method = served.settings.model_config.quantization
    console.print("\n[bold]1. How the folder was recognised[/]\n")
    console.print("No --quantization was given.", *(reasons or ["No format recognises the folder."]))
    console.print(f"vLLM's quantisation method is {method}." if method else "vLLM serves it as a float model.")


def layers(console: Console, served: Any, every_layer: bool) -> None:
    """Part 2: which scheme each layer got, and why."""
    from quant_core import get_scheme_class
    from vllm_ascend_quant.config import AscendQuantizationConfig

    config = served.settings.quant_config
    if not isinstance(config, AscendQuantizationConfig):
        return
    console.print("\n[bold]2. Which scheme each layer got, and from which key[/]\n")
    found = config.layers
    console.print(layer_table(found, every_layer))
    evidence = [entry for quant in found.values() for entry in quant.evidence]
    if evidence:
        files = ", ".join(sorted({entry.file for entry in evidence}))
        meaning = "A key is the checkpoint module's full name and the ending; its value is the type."
        if not any(quant.evidence[0].key.startswith(quant.modules) for quant in found.values() if quant.evidence):
            meaning = "A key is a group with the target that names the module, or an entry that ignores it."
        console.print(
            f"\n{meaning} One is {evidence[0].key}. They stand in {files}. --all-layers shows each layer by itself."
        )
    for name in sorted({quant.quant_type for quant in config.layers.values()} - {None}):
        scheme = get_scheme_class(name, "linear")
        formula = re.sub(r", (?=\w+ = )", ",\n  ", (scheme.__doc__ or "").splitlines()[0])
        console.print(f"{name} is {scheme.__name__}:\n  {formula}", markup=False)


def layer_table(found: dict[str, Any], every_layer: bool) -> Table:
    """One row per layer, or one for all that differ in their number only."""
    groups: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for path, quant in found.items():
        shared = f"{path.rpartition('.')[0]}."
        modules = "\n".join(module.removeprefix(shared) for module in quant.modules)
        quant_type = quant.quant_type or "FLOAT"
        keys = "\n".join(_key(entry, quant.modules, quant_type) for entry in quant.evidence)
        row = (path, quant_type, modules, keys)
        if not every_layer:
            row = tuple(re.sub(r"\.\d+\.", ".*.", text) for text in row)
        groups[row].update(int(number) for number in re.findall(r"\.(\d+)\.", path)[:1])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, row_styles=["", "dim"])
    for title in ("layer in vLLM", "type", "in the checkpoint", "by key"):
        table.add_column(title, overflow="fold")
    for (path, *others), numbers in groups.items():
        table.add_row(path.replace("*", _ranges(numbers), 1), *others)
    return table


def _key(entry: Any, modules: tuple[str, ...], quant_type: str) -> str:
    """A key without the module's name that it begins with, or its end, and its value if that is not simply the type."""
    module = next((module for module in modules if entry.key.startswith(f"{module}.")), "")
    ending = entry.key.removeprefix(module) if module else entry.key.rpartition(".")[2]
    return ending if entry.value == quant_type else f"{ending}: {entry.value}"


def _ranges(numbers: set[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def answers(console: Console, served: Any, problems: list[dict[str, str]], judged: bool) -> None:
    """Part 3: the first problem of some tasks, and the first that was answered wrongly."""
    console.print(f"\n[bold]3. Some prompts, and what the {served.title} model answers[/]\n")
    wrong = [i for i, problem in enumerate(problems) if served.answers[i] != problem["answer"]]
    firsts = sorted({problem["task"]: i for i, problem in reversed(list(enumerate(problems)))}.values())
    table = Table("prompt", "answer", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    if judged:
        table.add_column("right")
    for i in dict.fromkeys([*firsts[:6], *(wrong[:1] if judged else [])]):
        prompt, expected = problems[i]["prompt"].strip(), problems[i]["answer"].strip()
        verdict = f"no, {expected}" if i in wrong else "yes"
        table.add_row(prompt, served.answers[i].strip(), *([verdict] if judged else []))
    console.print(table)


def figures(console: Console, models: list[Any], problems: list[dict[str, str]], judged: bool) -> None:
    """Parts 4 to 6: accuracy, speed, memory."""
    title = "4. Accuracy, 5. speed, 6. memory" if judged else "5. Speed, 6. memory"
    console.print(f"\n[bold]{title}[/]\n")
    table = Table("\ncomputed in", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for model in models:
        dtype = str(model.settings.model_config.dtype).removeprefix("torch.")
        table.add_column(f"{model.title}\n{dtype}", justify="right")
    if judged:
        table.add_row(f"4. right answers of {len(problems)}", *(str(m.right(problems)) for m in models))
        table.add_row("   exact match", *(f"{m.right(problems) / len(problems):.3f}" for m in models))
    table.add_row("5. tokens per second (median)", *(f"{statistics.median(m.speeds):,.0f}" for m in models))
    table.add_row("   slowest round", *(f"{min(m.speeds):,.0f}" for m in models))
    table.add_row("   fastest round", *(f"{max(m.speeds):,.0f}" for m in models))
    memory = [model.weight_bytes() for model in models]
    table.add_row("6. bytes of the linear layers", *(f"{linear:,}" for linear, _ in memory))
    table.add_row("   bytes of all weights", *(f"{total:,}" for _, total in memory))
    console.print(table)
    _notes(console)


def _notes(console: Console) -> None:
    """What was counted, and what the figures do not say."""
    from quant_core.devices import current_device
    from quant_core.ops.cpu.int8_gemm import report

    console.print(
        "\nSpeed: generated tokens; all problems are handed over at once, reading them is included, the models take "
        f"turns. OpenMP threads: {os.environ['OMP_NUM_THREADS']}."
    )
    if current_device() == "cpu":
        console.print(
            "\nIt says more about this processor than about quantisation: without AVX512-BF16 or AMX there is no fast "
            "bfloat16 product, without VNNI no int8 product that is fast and exact. What an NPU gains is not measured "
            "here. Candidates for the int8 product, tried on this processor:"
        )
        for name, found in report().items():
            console.print(f"  {name}: {found}")
    console.print(
        "\nMemory: parameters as they are after loading, scales and biases included; a float weight that vLLM has "
        "packed for a kernel of its own counts as before. All weights: embeddings, output head and norms as well. Not "
        "counted: KV cache, activations."
    )
