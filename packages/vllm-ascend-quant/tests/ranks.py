"""Engines whose ranks are processes, started by a script of its own (this file) as a user's would be."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Engine:
    """A child process that answers prompts with a new engine and ends.

    Its ranks are processes of their own, as always. The engine's core is one too if `core_apart` says so, which is what
    users have, and takes as long as a rank to start.
    """

    def __init__(self, folder: Path, prompts: list[list[int]], core_apart: bool = False, **options: Any) -> None:
        apart = core_apart or options.get("data_parallel_size", 1) > 1
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart))},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(folder), prompts, options]))
        self._process.stdin.close()
        self._process.stdin = None

    def output(self) -> str:
        """All that it printed."""
        return self._process.communicate(timeout=500)[0]

    def answers(self) -> list[dict[str, Any]]:
        """Its answers in the form that compare.py reads."""
        printed = self.output()
        lines = [line for line in printed.splitlines() if line.startswith("FOUND")]
        assert lines, printed[-3000:]
        found: list[dict[str, Any]] = json.loads(lines[0].removeprefix("FOUND"))
        return found


async def every_engine(folder: str, prompts: list[list[int]], size: int, settings: dict[str, Any]) -> list[Any]:
    """What each data-parallel engine answers to all prompts, one engine after the other."""
    import conftest
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(folder, data_parallel_size=size, **settings))

    async def last(rank: int, index: int) -> Any:
        sampling = conftest.sampling()
        stream = llm.generate(
            {"prompt_token_ids": prompts[index]}, sampling, f"{rank}-{index}", data_parallel_rank=rank
        )
        async for output in stream:
            found = output
        return found

    try:
        return [await last(rank, index) for rank in range(size) for index in range(len(prompts))]
    finally:
        llm.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    chosen, asked, given = json.loads(sys.stdin.read())
    engines = given.pop("data_parallel_size", 1)
    if engines > 1:
        outputs = asyncio.run(every_engine(chosen, asked, engines, {**conftest.SETTINGS, **given}))
        found = conftest.in_form(asked * engines, outputs)
    else:
        with conftest.engine(chosen, **given) as llm:
            found = conftest.answers(llm, asked)
    print("\nFOUND" + json.dumps(found), flush=True)
