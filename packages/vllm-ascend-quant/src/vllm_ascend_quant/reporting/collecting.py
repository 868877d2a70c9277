"""Collecting the parts of a report from processes that may die."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vllm_ascend_quant.reporting.parts import Request

#: Seconds for one part. Importing vLLM takes up to a minute on a cold disk.
PATIENCE = 300.0

#: So many lines of what libraries print are shown, the last ones.
_LINES = 40


@dataclass(frozen=True)
class Part:
    """One part of a report.

    Attributes:
        title: what it is about.
        found: the answer.
        error: why there is none.
        said: what libraries printed meanwhile: warnings, mostly.

    """

    title: str
    found: Any = None
    error: str = ""
    said: str = ""

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        answer = {"error": self.error} if self.error else {"found": self.found}
        return answer | ({"said": self.said.splitlines()} if self.said else {})


def collect(requests: Sequence[Request], patience: float = PATIENCE) -> Iterator[Part]:
    """The parts, in order, each as soon as it is there. Never raises for what a part does.

    Args:
        requests: what is asked for.
        patience: seconds that one part may take.

    """
    left = list(requests)
    while left:
        # Fewer are left each time: one that takes the process along is answered for.
        for part in _from_one_process(left, patience):
            yield part
            left.pop(0)


def _from_one_process(requests: list[Request], patience: float) -> Iterator[Part]:
    """The parts that one process answers; if it ends before the last, the one that it ended at comes as an error."""
    # Opened twice: who shares an open file with a process shares the place at which it reads.
    with tempfile.NamedTemporaryFile("wb") as file, Path(file.name).open("rb") as noise:
        command = [sys.executable, "-m", "vllm_ascend_quant.reporting.child", json.dumps(requests)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
            for request in list(requests):
                line, late = _line(process, patience)
                title = " ".join(filter(None, request))
                if line.endswith("\n"):
                    answer = json.loads(line)
                    # It is on its way with the next part by now.
                    said = _news(noise, answer.pop("printed") - noise.tell())
                    yield Part(title, **answer, said=said)
                    continue
                how = f"took longer than {patience:g} seconds" if late else _ending(process.wait())
                yield Part(title, error=f"the process that looked for this {how}", said=_news(noise))
                return


def _line(process: "subprocess.Popen[str]", patience: float) -> tuple[str, bool]:
    """The next line that a process prints, nothing if it ended; whether it was ended for being late."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(patience, end)
    timer.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    timer.cancel()
    return line, late.is_set()


def _news(noise: IO[bytes], length: int = -1) -> str:
    """What was printed since the last time: so many bytes, or all."""
    return "\n".join(noise.read(length).decode(errors="replace").rstrip().splitlines()[-_LINES:])


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
