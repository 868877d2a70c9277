"""The native code of `quant_core/native`: compiled at first use, kept, tried, and used if it is right.

Python and torch read 8-bit pages several times slower than a CPU could. The source is in the package; the compiler that
torch itself compiles with makes one library for each torch and each of its CPU capabilities (AVX512, AVX2, neither), so
a library that is kept runs nothing that this processor does not have. It lies in torch's own folder of extensions
(TORCH_EXTENSIONS_DIR). Whoever comes first compiles, other processes wait.

QUANT_CORE_NATIVE=0 switches it off; then, or where it cannot be had, plain calls of torch serve.
"""

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SWITCH = "QUANT_CORE_NATIVE"
SOURCES = Path(__file__).parents[2] / "native"
_MAIN = "pages.cpp"

#: What torch's CPU capabilities mean, as g++ and clang call it.
_SETS = {
    "AVX512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    "AVX2": ("avx2", "fma", "f16c"),
}


class UnavailableError(Exception):
    """Why there is no native code."""


def flags() -> list[str]:
    """What the source is compiled with for this processor, or the older one that ATEN_CPU_CAPABILITY asks for.

    CXXFLAGS are added, as whoever sets them expects.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = next((names for name, names in _SETS.items() if capability.startswith(name)), ())
    linux = ["-fopenmp"] if sys.platform == "linux" else []
    wide = ["-mprefer-vector-width=512"] if "avx512f" in chosen else []
    return [
        *("-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"),
        *(f"-m{name}" for name in chosen),
        *wide,
        *linux,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def includes() -> list[str]:
    """Where torch's headers are."""
    from torch.utils.cpp_extension import include_paths

    return [f"-isystem{path}" for path in include_paths()]


def libraries() -> list[str]:
    """Torch's libraries, which the process has loaded already: they are named, so that they are found again."""
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]


def compiler() -> str:
    """The compiler that torch compiles extensions with: CXX, or c++ (g++ where it is the default)."""
    from torch.utils.cpp_extension import get_cxx_compiler

    return str(get_cxx_compiler())


def _key(command: list[str]) -> str:
    """Differs for everything that the library depends on."""
    parts = [torch.__version__, str(torch._C._GLIBCXX_USE_CXX11_ABI), platform.machine(), sys.platform, *command]
    text = "\n".join(parts).encode()
    return hashlib.sha256(text + b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))).hexdigest()[:24]


def folder() -> Path:
    """Where libraries are kept: torch's folder of extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "quant_core"


def _place(command: list[str], kept: Path) -> Path:
    """Where the library is that a command makes."""
    return kept / f"pages-{_key(command)}.so"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; a process that dies holds nobody up."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(to: Path | None = None) -> Path:
    """The library for this processor, compiled if nobody has before.

    Args:
        to: a folder to keep it in.

    Raises:
        UnavailableError: with what the compiler said.

    """
    try:
        command = [compiler(), *flags()]
        library = _place(command, to or folder())
        library.parent.mkdir(parents=True, exist_ok=True)
        if library.exists():
            return library
        with _alone(library.with_suffix(".lock")):
            if not library.exists():
                _compile(command, library)
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        raise UnavailableError(str(error) or type(error).__name__) from error
    return library


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        made = Path(work) / library.name
        whole = [*command, *includes(), str(SOURCES / _MAIN), *libraries(), "-o", str(made)]
        done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise UnavailableError(f"{command[0]} failed: {lines[0] if lines else done.returncode}")
        made.replace(library)


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "off")


def status() -> str:
    """How the native code stands on this machine, for reports: nothing is compiled for this answer."""
    if _switched_off():
        return f"switched off by {SWITCH}={os.environ[SWITCH]}"
    try:
        command = [compiler(), *flags()]
        library = _place(command, folder())
    except (OSError, ImportError, RuntimeError) as error:
        return f"cannot be compiled: {error}"
    if library.exists():
        return f"{'in use' if operators() is not None else 'compiled, but not usable'}: {library}"
    found = shutil.which(command[0])
    return f"not compiled yet: at first use, by {found}" if found else f"there is no compiler {command[0]!r} (CXX)"


@functools.cache
def operators() -> Any:
    """`torch.ops.quant_core_native`, or None if plain calls of torch must serve; that is said once."""
    if _switched_off():
        logger.info("%s=%s: caches of 8 bits are read in calls of torch", SWITCH, os.environ[SWITCH])
        return None
    try:
        torch.ops.load_library(str(build()))
        loaded = torch.ops.quant_core_native
        if wrong := refusal(loaded):
            raise UnavailableError(wrong)
    except (UnavailableError, OSError) as error:
        logger.warning(
            "The native code for caches of 8 bits cannot be used (%s): attention to them is several times slower. It "
            "needs a C++ compiler (g++ or clang++, or the one that CXX names) at first use; %s=0 silences this.",
            error,
            SWITCH,
        )
        return None
    return loaded


def refusal(candidate: Any) -> str | None:
    """Why native operators cannot serve on this processor; None if they compute what they must."""
    from quant_core.ops.cpu import native_probe

    threads = torch.get_num_threads()

    def run() -> str | None:
        # On a busy machine, many small calls take seconds to wait for other threads. For the rest of it see _race in
        # int8_gemm.py.
        torch._C.set_num_threads(1)
        try:
            return native_probe.refusal(candidate)
        finally:
            torch._C.set_num_threads(threads)

    with ThreadPoolExecutor(1) as own:
        return own.submit(run).result()
