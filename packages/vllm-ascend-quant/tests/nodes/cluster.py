"""Two nodes of Ray on this machine, each started as a user starts it, in an environment of its own."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Not in a folder of pytest's: Ray makes sockets below it, whose names may have 107 characters.
START = ["--block", "--num-cpus=1", "--object-store-memory=80000000"]


def install_platform(site: Path) -> None:
    """Announce npu_resource.py as a package of its own would."""
    metadata = site / "npu_resource-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("npu_resource.py"), site / "npu_resource.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: npu-resource\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nnpu = npu_resource:register\n")


@contextlib.contextmanager
def two_nodes(first: str, second: str, slots: int = 1) -> Iterator[str]:
    """A cluster whose nodes run in the environments of two Pythons, each with `slots` NPUs; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as nodes,
    ):
        log = Path(folder) / "nodes.log"
        resources = ["--resources", json.dumps({"NPU": slots})]
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
        nodes.enter_context(_node([first, *START, *resources, *head], log))
        address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
        _wait(first, address, 1, log)
        nodes.enter_context(_node([second, *START, *resources, f"--address={address}"], log))
        _wait(first, address, 2, log)
        yield address


@contextlib.contextmanager
def _node(command: list[str], log: Path) -> Iterator[None]:
    python, *options = command
    with log.open("ab") as output:
        process = subprocess.Popen(
            [python, "-m", "ray.scripts.scripts", "start", *options], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()  # and with it all that it started
        process.wait(60)


COUNT = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""


def _wait(python: str, address: str, nodes: int, log: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = subprocess.run([python, "-c", COUNT, address], capture_output=True, text=True, check=False)
        if f"alive {nodes}" in done.stdout:
            return
        time.sleep(1)
    raise AssertionError(f"{nodes} nodes are not ready: {done.stdout}{done.stderr[-1500:]}\n{log.read_text()[-3000:]}")
