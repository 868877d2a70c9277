"""Serve a quantised checkpoint with real vLLM, beside the float model that it was made from, and show what happened.

`nox -s demo` runs this; README.md explains what it prints.
"""

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import show
from rich.console import Console
from terminal import open_terminal, step

HERE = Path(__file__).resolve().parent
#: The small model in each format: as msModelSlim and as llm-compressor quantised it.
SMALL = {
    "modelslim": HERE / "model",
    "compressed-tensors": HERE.parents[1] / "testdata" / "checkpoints" / "llmcompressor" / "qwen3" / "W8A8_DYNAMIC",
}
ALLOWED_DROP = 0.03  # of accuracy, below the float model's
ROUNDS = 3  # that are timed, after one that is not

Problems = list[dict[str, str]]


@dataclass
class Served:
    """A model in a vLLM engine, what it answered, and how many tokens it generated per second in each round."""

    folder: str
    llm: Any
    answers: list[str] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)

    @property
    def settings(self) -> Any:
        """What vLLM made of the folder and our arguments."""
        return self.llm.llm_engine.vllm_config

    @property
    def title(self) -> str:
        """What kind of model it is."""
        return "quantised" if self.settings.model_config.quantization else "float"

    def answer(self, problems: Problems, timed: bool) -> None:
        """Answer all problems at once, greedily, each up to the next newline."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=32, stop=["\n"])
        start = time.perf_counter()
        outputs = self.llm.generate([problem["prompt"] for problem in problems], greedy, use_tqdm=False)
        seconds = time.perf_counter() - start
        self.answers = [output.outputs[0].text for output in outputs]
        if timed:
            self.speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)

    def right(self, problems: Problems) -> int:
        """How many answers are right."""
        return sum(answer == problem["answer"] for answer, problem in zip(self.answers, problems, strict=True))

    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of the linear layers' weights, and of all weights."""
        return self.llm.apply_model(_weight_bytes)[0]


def _weight_bytes(model: Any) -> tuple[int, int]:
    from torch import Tensor
    from vllm.model_executor.layers.linear import LinearBase

    held: dict[int, tuple[int, bool]] = {}  # by identity: tied weights count once
    for module in model.modules():
        linear = isinstance(module, LinearBase)
        tensors = list(module.parameters(recurse=False))
        if linear:
            tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
            if module.weight.numel() == 0:  # packed by vLLM for a kernel of its own, out of PyTorch's sight
                held[id(module)] = (module.input_size * module.output_size * module.params_dtype.itemsize, True)
        held |= {id(tensor): (tensor.numel() * tensor.element_size(), linear) for tensor in tensors}
    return sum(size for size, linear in held.values() if linear), sum(size for size, _ in held.values())


def load(folder: str, dtype: str) -> Served:
    """Start an engine. It is not told about quantisation: our plugin, which vLLM loads by itself, finds out."""
    from vllm import LLM

    llm = LLM(folder, dtype=dtype, max_model_len=512, enforce_eager=True, enable_prefix_caching=False)
    return Served(folder, llm)


def run(console: Console, options: argparse.Namespace) -> int:
    """Load, answer, show; the exit code."""
    lines = (HERE / "eval.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines[: options.problems]]
    judged = fits(options.model)
    with step(console, "importing vLLM"):
        import vllm  # noqa: F401
    models = []
    for folder, dtype in choose_models(options, judged):
        with step(console, f"starting vLLM with {folder}{'' if dtype == 'auto' else f' in {dtype}'}"):
            models.append(load(folder, dtype))
    turns = [(model, turn > 0) for turn in range(1 + ROUNDS) for model in models]
    with step(console, f"answering {len(problems)} problems, {1 + ROUNDS} times each model", len(turns)) as advance:
        for model, timed in turns:
            model.answer(problems, timed)
            advance()
    show.recognition(console, models[-1])
    show.layers(console, models[-1], options.all_layers)
    show.answers(console, models[-1], problems, judged)
    show.figures(console, models, problems, judged)
    if judged and len(models) > 1:
        return verdict(console, *(model.right(problems) / len(problems) for model in (models[0], models[-1])))
    reason = "no --float-model was given" if judged else "eval.jsonl was made for the small models of this repository"
    console.print(f"\nAccuracy was not compared: {reason}.")
    return 0


def choose_models(options: argparse.Namespace, small: bool) -> list[tuple[str, str]]:
    """Folder and dtype: the float model first, the quantised one last."""
    models = [(options.float_model, options.dtype), (options.model, options.dtype)]
    if small and options.dtype == "auto":
        # Many processors are slow in bfloat16: beside that alone, int8 would look faster than it is.
        models.insert(1, (options.float_model, "float32"))
    return [(folder, dtype) for folder, dtype in models if folder]


def fits(folder: str) -> bool:
    """Whether a model can be expected to know the answers in eval.jsonl: by the tokenizer, which is like no other."""
    tokenizers = (Path(folder, "tokenizer.json"), HERE / "model" / "tokenizer.json")
    return tokenizers[0].is_file() and tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def verdict(console: Console, before: float, after: float) -> int:
    """1 if quantising has cost more accuracy than it may."""
    failed = round(after - before, 6) < -ALLOWED_DROP
    console.print(
        f"\n{'[bold red]FAILED' if failed else '[bold green]OK'}[/]: the quantised model's accuracy differs by "
        f"{after - before:+.3f} from the float model's; allowed is -{ALLOWED_DROP}."
    )
    return int(failed)


def parse_options() -> argparse.Namespace:
    """The command line. Beside someone's own model there is no float model unless it is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=SMALL, default="modelslim", help="of the small model (default: modelslim)")
    parser.add_argument("--model", help="another checkpoint, in any format that is installed")
    parser.add_argument("--float-model", help="the model that it was quantised from, for comparison")
    parser.add_argument("--problems", type=int, default=200, help="how many of the 200 in eval.jsonl (default: all)")
    parser.add_argument("--all-layers", action="store_true", help="give every layer a row of its own")
    parser.add_argument("--dtype", default="auto", help="what vLLM computes in (default: as config.json says)")
    parser.add_argument("--threads", default="1", help="OpenMP threads (default: 1, for a small model)")
    options = parser.parse_args()
    if options.problems < 1:
        parser.error("--problems must be at least 1")
    if options.model is None:
        options.model = os.path.relpath(SMALL[options.format])
        options.float_model = options.float_model or os.path.relpath(HERE / "float")
    return options


def set_up(threads: str) -> tuple[Console, str]:
    """Set vLLM up for a small machine, and a console; what vLLM prints goes to a file, whose name comes second."""
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where we can look into it
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's default is a large share of the memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's default keeps one core free
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.update({name: value for name, value in defaults.items() if name not in os.environ})
    console, log = open_terminal()
    console.print(f"vLLM's warnings go to {log}")
    return console, log


def main() -> int:
    """Run the demo; tracebacks go to the file."""
    options = parse_options()
    console, log = set_up(options.threads)
    try:
        return run(console, options)
    except Exception as error:
        traceback.print_exc()
        console.print(f"[bold red]{type(error).__name__}[/]", end=": ")
        console.print(error, f"\nThe traceback is in {log}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
