"""The packages that a config was made with, which a process that gets it from another machine must have as well.

An engine's processes on one machine share an environment. Ray starts workers on other machines, in environments of
their own, and sends them what the front process read: with other packages it could mean something else there.
"""

import functools
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points

from quant_core import QuantError, list_formats
from quant_core import __version__ as core_version
from quant_core.formats import ENTRY_POINT_GROUP
from vllm_ascend_quant import __version__


class VersionsError(QuantError):
    """A worker runs other packages than the process that read the checkpoint."""


@functools.cache
def packages(format_name: str) -> Mapping[str, str]:
    """The distributions here that a checkpoint of a format is served with, and their versions."""
    found = {"vllm-ascend-quant": __version__, "quant-core": core_version}
    quant_format = list_formats().get(format_name)
    module = "" if quant_format is None else quant_format.__module__.partition(".")[0]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.dist is not None and entry.module.partition(".")[0] == module:
            # What is imported, if it says so; what is installed may be older in a developer's environment.
            found[entry.dist.name] = getattr(sys.modules[module], "__version__", entry.dist.version)
    return found


def check_same(format_name: str, expected: Mapping[str, str]) -> None:
    """Make sure that this process has the packages that a config was made with.

    Args:
        format_name: of the config.
        expected: `packages` of the process that made it.

    Raises:
        VersionsError: names this machine, and what is absent or differs.

    """
    here = packages(format_name)
    different = [name for name in expected if here.get(name) != expected[name]]
    if different:
        node = socket.gethostname()
        raise VersionsError(
            f"the node {node} cannot serve what was read elsewhere: its packages are others",
            where=f"{sys.executable} on {node}",
            found=", ".join(f"{name} {here[name]}" if name in here else f"no {name}" for name in different),
            expected=listed({name: expected[name] for name in different}),
            todo="install the same versions on every node, then start Ray there anew",
        )


def listed(versions: Mapping[str, str]) -> str:
    """Distributions and their versions, for messages."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
