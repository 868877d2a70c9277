"""Loading half a billion parameters through vLLM: time beside vLLM's own path, and the peak while processing.

Each load is a process of its own, in turn; the files are in the page cache.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from half_billion import write_both
from measure import arguments, report

_MARK = "LOADED "


def main() -> None:
    """Print one row per format."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help="internal: load this folder and print what it took")
    options = parser.parse_args()
    if options.child:
        print(_MARK + json.dumps(_load(options.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folders = write_both(Path(name))
        found: dict[str, list[dict[str, float]]] = {format_: [] for format_ in folders}
        for _ in range(options.rounds):
            for format_, folder in folders.items():
                found[format_].append(_in_process(folder))
    rows = [[format_, *(min(run[key] for run in runs) for key in KEYS)] for format_, runs in found.items()]
    title = "Loading 0.5 B parameters, W8A8 with dynamic scales, through vLLM (best of all rounds)"
    report("loading", title, ["", *KEYS.values()], rows)


KEYS = {
    "seconds": "load, s",
    "cpu_seconds": "load, s of CPU",
    "process_seconds": "of which processing, s",
    "peak": "peak while processing, MB above before",
    "layer": "largest layer, MB",
}


def _in_process(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(folder)]
    # The engine in the process that watches it.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise RuntimeError(f"{folder} was not loaded:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(_MARK))


def _load(folder: str) -> dict[str, float]:
    """Load through vLLM, watching the two functions in which it loads and processes."""
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    found: dict[str, float] = {}
    process, load = base_loader.process_weights_after_loading, base_loader.BaseModelLoader.load_model

    def watched_process(model, *args, **kwargs):
        linear = [module for module in model.modules() if "Linear" in type(module).__name__]
        found["layer"] = max(sum(p.nbytes for p in layer.parameters(recurse=False)) for layer in linear) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before, code, start = _memory("VmRSS"), _memory("RssFile"), time.perf_counter()
        result = process(model, *args, **kwargs)
        found["process_seconds"] = time.perf_counter() - start
        # Libraries whose pages are touched for the first time are no part of it.
        found["peak"] = (_memory("VmHWM") - before - (_memory("RssFile") - code)) / 2**20
        return result

    def watched_load(self, *args, **kwargs):
        start, cpu = time.perf_counter(), time.process_time()
        model = load(self, *args, **kwargs)
        found["seconds"], found["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
        return model

    base_loader.process_weights_after_loading = watched_process
    base_loader.BaseModelLoader.load_model = watched_load
    LLM(folder, skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, max_num_batched_tokens=64)
    return found


def _memory(key: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
