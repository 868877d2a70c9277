"""From a checkpoint module to its type, by the description and by what the files hold."""

import difflib
from collections.abc import Mapping

import torch

from quant_core import Evidence, LayerResolutionError, StoredForm, UnknownLayerError
from quant_core.errors import listing
from quant_modelslim.description import FLOAT, Description

#: Where the type of a module stands: at its weight, or at that of the linear inside a smoothing wrapper.
TYPE_KEYS = ("weight", "linear.weight")

#: Dtypes that a float layer's weight never has.
QUANTISED_DTYPES = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2})


def module_type(description: Description, stored: Mapping[str, StoredForm], module: str) -> tuple[str, Evidence]:
    """The type of one checkpoint module and the entry that says so.

    A module without a key is float if the files hold a float weight of its name: writers leave out what they did not
    look at.

    Raises:
        LayerResolutionError: if the files hold a quantised weight that the description does not mention.
        UnknownLayerError: if neither knows the module.

    """
    for suffix in TYPE_KEYS:
        key = f"{module}.{suffix}"
        if key in description.types:
            return description.types[key], Evidence(description.file, key, description.types[key])
    form = stored.get(module)
    if form is not None and form.has("weight"):
        weight = form.tensors["weight"]
        if weight.dtype in QUANTISED_DTYPES:
            raise LayerResolutionError(
                f"{module}: {weight.file} holds a {_name(weight.dtype)} weight that {description.file} does not mention",
                expected=f"the key {module}.weight",
                todo="take description and weights from one run of the tool",
            )
        return FLOAT, Evidence(weight.file, weight.name, f"{_name(weight.dtype)}, no key in {description.file}")
    raise UnknownLayerError(
        f"{module}: neither {description.file} nor the weight files know this layer",
        expected=f"one of the keys {listing(f'{module}.{suffix}' for suffix in TYPE_KEYS)}",
        found=f"the nearest keys are {listing(nearest(module, description)) or 'none'}",
        todo="check that config.json describes the model that was quantised",
    )


def agreed_type(types: Mapping[str, str], layer: str) -> str:
    """The one type of all members of a fused layer.

    Raises:
        LayerResolutionError: names each member's type.

    """
    if len(set(types.values())) > 1:
        raise LayerResolutionError(
            f"{layer}: the members of this fused layer have different types",
            found=", ".join(f"{module} is {quant_type}" for module, quant_type in types.items()),
            expected="one type for all of them, since they are multiplied at once",
            todo="quantise the members alike, or leave all of them FLOAT",
        )
    return next(iter(types.values()))


def nearest(module: str, description: Description, count: int = 3) -> list[str]:
    """The described modules whose names come closest."""
    modules = {key.rpartition(".")[0] for key in description.types if key.endswith(".weight")}
    last = module.rpartition(".")[2]
    # Comparing with every key of a large model takes seconds; what shares the last component is what one mistypes.
    alike = [m for m in modules if m.rpartition(".")[2] == last] or sorted(modules)[:2000]
    return difflib.get_close_matches(module, alike, n=count, cutoff=0.3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
