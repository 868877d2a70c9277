"""Import the real torch_npu on a machine that has neither NPU nor CANN, to test against its schemas and Meta kernels.

torch_npu's library links against CANN's. While it is only imported, next to nothing of CANN runs: it suffices that the
dynamic linker finds libraries of those names which export the functions. This tool compiles such stand-ins into a
temporary folder and runs a command with them. They report no device, so nothing can be put on "npu"; schemas, Meta
kernels, and CPU kernels that others register for the same operators work.

    python tools/torch_npu_without_cann.py run -- pytest packages/quant-core/tests/schemas
    python tools/torch_npu_without_cann.py dump npu_quant_matmul npu_dynamic_quant

Needs Linux, gcc, binutils, and torch and torch_npu of matching versions beside the Python that runs it.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Everything else returns 0, which is CANN's code for success.
WITH_A_BODY = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B1"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "a stand-in for CANN"; }',
}

DUMP = """
import contextlib, json, sys, torch
with contextlib.redirect_stdout(sys.stderr):  # it prints that CANN is not set up
    import torch_npu
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
operators = {}
for schema in sorted(map(str, torch._C._jit_get_all_schemas())):
    qualified = schema.partition("(")[0]
    namespace, _, name = qualified.partition("::")
    if namespace == "npu" and (len(sys.argv) == 1 or name.split(".")[0] in sys.argv[1:]):
        operators[name] = {"schema": schema, "meta_kernel": has_kernel(qualified, "Meta")}
print(json.dumps({"torch_npu": torch_npu.__version__, "operators": operators}, indent=1))
"""


def main() -> int:
    """Build the stand-ins and do as the command line says; the exit code of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run a command in whose processes torch_npu can be imported")
    run.add_argument("command", nargs="+", help="after --")
    dump = actions.add_parser("dump", help="print schemas, and which operators have a Meta kernel, as JSON")
    dump.add_argument("operator", nargs="*", help="without the namespace; all of them if none is named")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="without-cann-") as folder:
        build(Path(folder))
        dumping = arguments.action == "dump"
        command = [sys.executable, "-c", DUMP, *arguments.operator] if dumping else arguments.command
        code = subprocess.run(command, env=environment(folder), check=False).returncode
        if code != 0:
            explain(Path(folder))
        return code


def build(folder: Path) -> None:
    """Fill a folder with the libraries that torch_npu asks for."""
    npu, torch = package("torch_npu"), package("torch")
    # What is loaded at import; the library for ATB operators waits until one of them is called.
    wheel = [path for path in [*npu.glob("*.so"), *npu.glob("lib/*.so")] if "atb" not in path.name]
    beside = [*wheel, *npu.parent.glob("torch_npu.libs/*.so*"), *torch.glob("lib/*.so*")]

    process = ctypes.CDLL(None)  # Python and libc
    wanted = set().union(*map(undefined, wheel)).difference(*map(defined, beside))
    names = sorted(name for name in wanted if not hasattr(process, name))
    source = "\n".join(WITH_A_BODY.get(name, f"long {name}(void) {{ return 0; }}") for name in names)
    libraries = set().union(*map(needed, wheel)) - {path.name for path in beside}
    first, *others = sorted(name for name in libraries if not loadable(name))

    compiler = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(folder / first)]
    subprocess.run(compiler, input=source, text=True, check=True)
    for name in others:
        (folder / name).symlink_to(first)  # one library under all names


def explain(folder: Path) -> None:
    """Say whether the stand-ins are why a command failed."""
    command = [sys.executable, "-c", "import torch, torch_npu"]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        libraries = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(
            f"torch_npu cannot be imported over stand-ins for {libraries}. A library or function that this release "
            f"wants besides has to be added in {__file__}:\n{done.stderr}",
            file=sys.stderr,
        )


def environment(folder: Path | str) -> dict[str, str]:
    """The variables with which a process finds the stand-ins."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    # Without the last one `import torch` imports torch_npu, half of itself being there.
    return {**os.environ, "LD_LIBRARY_PATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"{name} is not installed beside {sys.executable}")
    return Path(spec.origin).parent


def undefined(library: Path) -> set[str]:
    """Functions that a library must find elsewhere, less those of glibc and libstdc++, whose names carry a version."""
    return set(re.findall(r"^ +U ([^@\s]+)$", output("nm", "-D", "--undefined-only", library), re.MULTILINE))


def defined(library: Path) -> set[str]:
    """What a library exports."""
    return set(re.findall(r"([^@\s]+)(?:@\S+)?$", output("nm", "-D", "--defined-only", library), re.MULTILINE))


def needed(library: Path) -> set[str]:
    """Libraries that a library is linked against."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library)))


def loadable(name: str) -> bool:
    """Whether the system has a library of this name."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
