"""Throughput of the OpenAI-compatible server: the demo's model, quantised and in float, asked over HTTP in turns."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import arguments, report

DEMO = Path(__file__).parents[1] / "examples" / "demo"

#: What is served; the quantised model is recognised by its folder.
MODELS = {
    "float, bfloat16": ("float", "bfloat16"),
    "float, float32": ("float", "float32"),
    "W8A8": ("model", "bfloat16"),
}


def main() -> None:
    """Print one row per model."""
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in (DEMO / "eval.jsonl").read_text().splitlines()]
    with contextlib.ExitStack() as stack:
        # All at once, so that they can take turns.
        urls = {name: stack.enter_context(serving(*what)) for name, what in MODELS.items()}
        speeds: dict[str, list[float]] = {name: [] for name in urls}
        for _ in range(options.rounds + 1):
            for name, url in urls.items():
                speeds[name].append(tokens_per_second(url, prompts, options.clients, options.tokens))
    rows = [[name, *summary(found[1:])] for name, found in speeds.items()]  # the first round warms up
    title = f"Tokens per second of `vllm serve`, {options.clients} clients, {len(prompts)} prompts a round"
    report("server", title, ["", "median", "slowest round", "fastest round"], rows)


def summary(speeds: list[float]) -> tuple[float, float, float]:
    """Median, slowest, fastest."""
    ordered = sorted(speeds)
    return ordered[len(ordered) // 2], ordered[0], ordered[-1]


def tokens_per_second(url: str, prompts: list[str], clients: int, tokens: int) -> float:
    """Of answers that all have the same length."""

    def ask(prompt: str) -> int:
        content = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(ask, prompts))
    return count / (time.perf_counter() - start)


@contextlib.contextmanager
def serving(folder: str, dtype: str) -> Iterator[str]:
    """The address of a server of one of the demo's folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO / folder)]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
    command += ["--max-model-len", "256", "--no-enable-prefix-caching"]
    with tempfile.NamedTemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait(f"http://127.0.0.1:{port}", process, Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; raises RuntimeError with what it printed if it ends before."""
    while True:
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-4000:])
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        time.sleep(1)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
