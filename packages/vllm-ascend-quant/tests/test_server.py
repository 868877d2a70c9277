"""The OpenAI-compatible server in processes of its own, as a user starts it: no --quantization, default engine mode."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
MODEL = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"not ready after {seconds} s: {log.read_text()[-3000:]}")


def test_a_folder_is_recognised_and_answers_over_http(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--served-model-name", "tiny"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=tmp_path,
        )
    try:
        wait_until_ready(url, server, log)
        request = urllib.request.Request(
            f"{url}/v1/completions",
            data=json.dumps({"model": "tiny", "prompt": "\n64 - 40 =", "max_tokens": 4, "temperature": 0}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(60)
    assert answer.startswith(" 24."), answer
    assert "ascend: 12 linear layers W8A8" in log.read_text()
