"""What all benchmarks share: alternating runs, the processor's abilities, a table, a JSON file."""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each row of a table is measured")
    return parser


def alternating(candidates: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The best time of each candidate in seconds; they take turns, so that whatever disturbs one disturbs all.

    With one thread it is processor time, which other processes disturb less than wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}

    def measure(name: str) -> None:
        start = clock()
        candidates[name]()
        best[name] = min(best.get(name, float("inf")), clock() - start)

    for name in candidates:
        measure(name)
    slow = {name for name, taken in best.items() if taken > 20 * min(best.values()) and taken > 0.5}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name in candidates.keys() - slow:  # for which once is enough
            measure(name)
        rounds += 1
    return best


def processor() -> dict[str, Any]:
    """The model, what decides which kernels are fast, and how busy the machine is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = dict(part for line in lines if len(part := [p.strip() for p in line.split(":", 1)]) == 2)
    flags = set(told.get("flags", "").split())
    kinds = {"AVX2": "avx2", "AVX512-VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni", "AVX512-BF16": "avx512_bf16"}
    kinds["AMX"] = "amx_tile"
    return {
        "model": told.get("model name", "unknown"),
        "has": [name for name, flag in kinds.items() if flag in flags],
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def report(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **more: Any) -> None:
    """Print a table and keep it as JSON in benchmarks/results."""
    machine = processor()
    print(f"\n{title}")
    print(f"{machine['model']}: {', '.join(machine['has'])}; {machine['threads']} threads, load {machine['load']}")
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *texts]) for i in range(len(columns))]
    for row in [columns, *texts]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "processor": machine, "columns": list(columns), "rows": [list(r) for r in rows], **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _text(cell: Any) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else "-" if cell is None else str(cell)
