"""The parts of a report: what each is called, and which function (`module:name`, in this package) answers it."""

from collections.abc import Iterable
from typing import NamedTuple


class Request(NamedTuple):
    """One part that is asked for.

    Attributes:
        name: one of PARTS.
        argument: the model, for a part about one.

    """

    name: str
    argument: str = ""


#: What needs least comes first: it is printed even if something later takes long.
PARTS = {
    "machine": "machine:machine",
    "environment variables": "machine:environment",
    "CANN": "machine:cann",
    "versions": "packages:versions",
    "versions that do not fit together": "packages:misfits",
    "plugins": "packages:plugins",
    "import torch": "machine:torch",
    "switched off": "serving:switches",
    "processor": "machine:processor",
    "NPUs": "machine:npus",
    "products on this processor": "serving:products",
    "formats": "serving:formats",
    "schemes": "serving:schemes",
    "vLLM": "serving:vllm",
}

#: The part after whose failure the others are looked for without what torch imports by itself.
TORCH = "import torch"

#: The part about a model.
MODEL = "model"


def parts_of(models: Iterable[str] = ()) -> list[Request]:
    """All parts of a report about these models."""
    return [*map(Request, PARTS), *(Request(MODEL, model) for model in models)]
