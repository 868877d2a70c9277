"""The table of registered schemes; `python -m quant_core.overview` prints it.

It stands in this package's README between two comments, and a test fails when it is stale.
"""

from quant_core.schemes.base import Scheme
from quant_core.schemes.registry import list_schemes

_HEAD = ("quant type", "layer", "devices", "granularity", "numbers checked against")


def table() -> str:
    """This package's schemes as a Markdown table."""
    own = {key: cls for key, cls in list_schemes().items() if cls.__module__.startswith("quant_core.")}
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(*key, cls) for key, cls in own.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(quant_type: str, layer_type: str, scheme_class: type[Scheme]) -> tuple[str, ...]:
    devices = ", ".join(scheme_class.supported_devices)
    checked = ", ".join(scheme_class.checked_against.get(quant_type, ())) or "float64 definitions only"
    return f"`{quant_type}`", layer_type, devices, ", ".join(scheme_class.granularity) or "-", checked


if __name__ == "__main__":
    print(table())
