"""From a checkpoint module to its type, by the description and by what the files hold."""

import difflib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from quant_core import (
    CheckpointFolder,
    Evidence,
    LayerResolutionError,
    UnknownLayerError,
    UnsupportedSchemeError,
    detect_formats,
)
from quant_core.errors import listing
from quant_modelslim.description import NAME, Description
from quant_modelslim.type_names import FLOAT, FLOAT_TYPES

#: Letters of a name that is compared with others: the time that it takes grows with their square.
_LONGEST = 200

#: Members of a fused layer, of which all are named.
_FEW = 6

#: Dtypes that no float tensor has.
QUANTISED_DTYPES = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})


def module_type(description: Description, folder: CheckpointFolder, module: str) -> tuple[str, Evidence] | None:
    """The type of one checkpoint module and the entry that says so; None if neither description nor files know it.

    A module without a key is float if the files hold a float weight of its name: writers leave out what they did not
    look at.

    Raises:
        UnsupportedSchemeError: if the module is wrapped by one that smooths its input.
        LayerResolutionError: if the files hold a quantised weight that the description does not mention.

    """
    key = f"{module}.weight"
    said = description.types.get(key)
    if said is not None:
        return FLOAT if said in FLOAT_TYPES else said, Evidence(description.file, key, said)
    if f"{module}.linear.weight" in description.types:
        raise smoothed([module])
    form = folder.modules.get(module)
    if form is None or not form.has("weight"):
        return None
    weight = form.tensors["weight"]
    if not is_float(weight.dtype):
        raise undescribed([module], description, folder)
    return FLOAT, Evidence(weight.file, weight.name, f"{dtype_name(weight.dtype)}, no key in {description.file}")


def agreed_type(types: Mapping[str, str], layer: str) -> str:
    """The one type of all members of a fused layer.

    Raises:
        LayerResolutionError: names each member's type.

    """
    if len(set(types.values())) > 1:
        usual, count = Counter(types.values()).most_common(1)[0]
        many = len(types) > _FEW  # experts: those that differ tell more than all of them
        named = [f"{module} is {quant_type}" for module, quant_type in types.items() if not many or quant_type != usual]
        raise LayerResolutionError(
            f"{layer}: the {'experts of this layer' if many else 'members of this fused layer'} have different types",
            found=listing(named) + (f"; the other {count} are {usual}" if many else ""),
            expected="one type for all of them, since they are multiplied at once",
            todo="quantise the members alike, or leave all of them FLOAT",
        )
    return next(iter(types.values()))


def unknown(
    layer: str, modules: Iterable[str], description: Description, folder: CheckpointFolder
) -> UnknownLayerError:
    """The error for a layer whose modules are known neither to the description nor to the files."""
    names = list(modules)
    return UnknownLayerError(
        f"{layer}: neither {description.file} nor the weight files know this layer",
        where=folder.path,
        expected=f"the keys {listing(f'{name}.weight' for name in names)}",
        found=_nearest_keys(names, description),
        todo=_advice(folder, "check that config.json describes the model that was quantised"),
    )


def undescribed(modules: Iterable[str], description: Description, folder: CheckpointFolder) -> LayerResolutionError:
    """The error for quantised weights without a key."""
    names = sorted(modules)
    weights = [folder.modules[name].tensors["weight"] for name in names]
    return LayerResolutionError(
        f"{description.file} does not mention {len(names)} quantised weights: "
        + listing(f"{weight.name} ({dtype_name(weight.dtype)} in {weight.file})" for weight in weights),
        where=folder.path,
        expected=f"the keys {listing(weight.name for weight in weights)}",
        found=_nearest_keys(names, description),
        todo=_advice(folder, "take description and weights from one run of the tool"),
    )


def smoothed(modules: Iterable[str]) -> UnsupportedSchemeError:
    """The error for linear layers whose input is multiplied by a stored factor first."""
    return UnsupportedSchemeError(
        f"the input of these layers is smoothed by a stored factor, which is not served yet: {listing(modules)}",
        found="tensors below `linear` and the factor `div.mul_scale`, as NonFusionSmoothQuant writes them",
        todo="quantise without NonFusionSmoothQuant",
    )


def nearest(module: str, description: Description, count: int = 3) -> list[str]:
    """The described modules whose names come closest."""
    components = set(module.split("."))
    modules = sorted({key.rpartition(".")[0] for key in description.types if key.endswith(".weight")})
    # Comparing letter by letter with every module of a large model takes seconds.
    short = (other for other in modules if len(other) <= _LONGEST)
    alike = heapq.nlargest(200, short, key=lambda other: len(components.intersection(other.split("."))))
    return difflib.get_close_matches(module[:_LONGEST], alike, n=count, cutoff=0.3)


def is_float(dtype: torch.dtype) -> bool:
    """Whether a float weight may have this dtype."""
    return dtype.is_floating_point and dtype not in QUANTISED_DTYPES


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a dtype, for messages."""
    return str(dtype).removeprefix("torch.")


def _nearest_keys(modules: list[str], description: Description) -> str:
    keys = dict.fromkeys(f"{near}.weight" for module in modules[:3] for near in nearest(module, description))
    return f"the nearest keys are {listing(keys)}" if keys else "no key resembles it"


def _advice(folder: CheckpointFolder, usual: str) -> str:
    """What to do; mentions whatever else the folder looks like."""
    others = [d.reason for d in detect_formats(folder) if d.format != NAME]
    if folder.declared_method is not None:
        others.append(f"config.json declares the method {folder.declared_method!r}")
    return usual + (f"; it looks like another format: {'; '.join(others)}" if others else "")
