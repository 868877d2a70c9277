"""The demo's terminal: progress and results on it, everything else in a file."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def open_terminal() -> tuple[Console, str]:
    """A console on the terminal. All else that is printed from now on, by C++ too, goes to a file."""
    width = shutil.get_terminal_size().columns
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding, errors="replace")
    handle, log = tempfile.mkstemp(prefix="ascend-quant-demo-", suffix=".log")
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    return Console(file=terminal, width=width, highlight=False), log


@contextmanager
def step(console: Console, text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show that something goes on, then leave a line with the time it took; yields what advances the bar."""
    columns = (SpinnerColumn(), TimeElapsedColumn(), BarColumn(16), TextColumn("{task.description}"))
    shown = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # rich would send what is meant for the file to the terminal
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    start = time.perf_counter()
    with shown:
        task = shown.add_task(text, total=total)
        yield lambda: shown.advance(task)
    console.print(f"[green]{time.perf_counter() - start:6.1f} s[/]  ", end="")
    console.print(text, markup=False)
