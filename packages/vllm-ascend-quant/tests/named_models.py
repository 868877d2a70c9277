"""A process that names models to vLLM, one after the other: where its hub and cache are is decided at its start."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def run(steps: dict[str, dict[str, Any]], hub: str, cache: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """What became of each step, by its name.

    Args:
        steps: vLLM's arguments, `model` among them; with `prompts`, an engine answers them.
        hub: address of a stand-in, which is told the name of each step by a request for /mark/<name>.
        cache: the folder below which the process finds and puts what it downloads.
        environment: variables of the process.

    """
    hubs = {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "MODELSCOPE_ENDPOINT": hub, "MODELSCOPE_CACHE": str(cache)}
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([hub, steps]),
        env={**known, **hubs, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(steps), (done.stdout + done.stderr)[-4000:]
    return dict(zip(steps, found, strict=True))


def step(model: str, prompts: list[list[int]] | None = None, **options: Any) -> dict[str, Any]:
    """The method, the folder that was checked, and the answers."""
    if prompts:
        with conftest.engine(model, **options) as llm:
            return {"answers": conftest.answers(llm, prompts)}
    config = conftest.front(model, **options)
    checked = getattr(config.quant_config, "format", None)
    return {"method": config.model_config.quantization, "folder": checked and str(checked.folder.path)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    address, named = json.loads(sys.stdin.read())
    for name, arguments in named.items():
        with contextlib.suppress(urllib.error.URLError):  # the stand-in has no such page, if there is one at all
            urllib.request.urlopen(f"{address}/mark/{name}")
        try:
            result = step(**arguments)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("\nFOUND " + json.dumps(result), flush=True)
