"""The OpenAI-compatible server in processes of its own, as a user starts it: no --quantization, default engine core."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
MODEL = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8"

# One after the other: an engine of several processes keeps both cores of a small machine busy.
pytestmark = pytest.mark.xdist_group("engines of several processes")

#: The model was trained on bare lines, so its tokenizer comes without a template.
CHAT_TEMPLATE = "{% for message in messages %}\n{{ message.content }}{% endfor %}"


@dataclass
class Server:
    """A running server and what it prints."""

    url: str
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=120) as response:
            return str(response.read().decode())

    def post(self, path: str, **content: Any) -> Any:
        """The first choice of an answer, always the most probable one."""
        data = json.dumps({"model": "tiny", "temperature": 0, "max_tokens": 16, **content}).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["choices"][0]

    def complete(self, prompt: str, **content: Any) -> str:
        return str(self.post("/v1/completions", prompt=prompt, **content)["text"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, server.log.read_text()[-3000:]
        try:
            server.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
        else:
            return
    raise AssertionError(f"not ready after {seconds} s: {server.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: it takes longer to start than to ask."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    running = Server(f"http://127.0.0.1:{port}", folder / "server.log")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--chat-template", CHAT_TEMPLATE]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with running.log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        wait_until_ready(running, process)
        yield running
    finally:
        process.terminate()
        process.wait(60)


def questions(count: int) -> list[tuple[str, str]]:
    """What the model was trained to answer, and the right answers."""
    lines = (DATA / "models" / "eval.jsonl").read_text().splitlines()
    return [(line["prompt"], line["answer"]) for line in map(json.loads, lines[:count])]


def test_a_folder_is_recognised_and_answers_over_http(server: Server) -> None:
    assert server.complete("\n64 - 40 =", max_tokens=4).startswith(" 24.")
    assert re.search(r"ascend: 12 (linear )?layers W8A8$", server.log.read_text(), re.MULTILINE)


def test_chat(server: Server) -> None:
    """The same prompt through the template, so the same answer."""
    messages = [{"role": "user", "content": "The larger of 85 and 624 is"}]
    choice = server.post("/v1/chat/completions", messages=messages, max_tokens=5)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip().startswith("624.")
    expected = server.complete("\nThe larger of 85 and 624 is", max_tokens=5)
    assert choice["message"]["content"].strip() == expected.strip()


def test_concurrent_requests(server: Server) -> None:
    """Eight clients at once get the answers that one gets, and most are right."""
    asked = questions(32)
    prompts = [prompt for prompt, _ in asked]
    one_by_one = [server.complete(prompt) for prompt in prompts]
    assert sum(found.startswith(right) for found, (_, right) in zip(one_by_one, asked, strict=True)) >= 28
    most = 0.0
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(server.complete, prompt) for prompt in prompts]
        while not all(answer.done() for answer in answers):
            running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", server.get("/metrics"), re.MULTILINE)
            assert running is not None
            most = max(most, float(running[1]))
    assert [answer.result() for answer in answers] == one_by_one
    assert most > 1, "the server never computed two requests at once"
