"""Comparing the description with the files, from metadata alone and before an engine exists."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from quant_core import (
    CheckpointError,
    CheckpointFolder,
    LoadError,
    PlannedFolder,
    QuantError,
    StoredForm,
    UnsupportedSchemeError,
    get_scheme_class,
    require_scheme_class,
)
from quant_core.errors import listing
from quant_core.formats import LayerQuant, LayerQuery, layer_context
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.composed import compose, reasons_against
from quant_core.schemes.registry import LAYER_TYPES
from quant_core.schemes.verify import verify_stored
from quant_modelslim.description import ATTENTION_TYPE, Description
from quant_modelslim.resolve import QUANTISED_DTYPES, dtype_name, is_float, smoothed, undescribed
from quant_modelslim.type_names import FLOAT_TYPES, SIMULATED_RANKS, UNUSABLE

#: A module's form without its name: modules of equal signature need one check.
Signature = frozenset[tuple[str, tuple[int, ...], torch.dtype]]


def validate(folder: CheckpointFolder, description: Description) -> None:
    """Check everything that does not need the model.

    Raises:
        UnsupportedSchemeError: lists the layers of each type that nobody registered.
        CheckpointError: lists the places in which description and files contradict each other or themselves.
        LayerResolutionError: lists quantised weights that the description does not mention.
        LoadError: lists modules whose tensors are not those of their type.

    """
    _check_types(description)
    problems = [
        *_absent(folder, description),
        *_absent_rotations(folder, description),
        *_integers_as_float(folder, description),
        *_several_types(description),
    ]
    if problems:
        raise CheckpointError(
            f"{description.file} and the weight files contradict each other in {len(problems)} places",
            where=folder.path,
            found="\n    ".join([*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]),
            todo="take description and weights from one run of the tool; finish the download",
        )
    _check_modules(folder, description)
    _check_forms(folder.modules, description)


def plan(folder: PlannedFolder, description: Description) -> None:
    """Take the modules from the description, where there are no weights to compare it with.

    Raises:
        UnsupportedSchemeError: lists the layers of each type that nobody registered.
        CheckpointError: if the description does not tell what would be stored.

    """
    _check_types(description)
    if description.keys.group_size:
        raise CheckpointError(
            f"{folder.path} has no weights, and {description.file} does not tell which scales are stored",
            found=f"group_size {description.keys.group_size}, which holds for some of the types only",
            expected="types with one scale per channel",
            todo="put the weight files into the folder; their headers suffice, values are not read",
        )
    folder.plan(dict.fromkeys(key.rpartition(".")[0] for key in description.types))


def _check_types(description: Description) -> None:
    keys: dict[tuple[str, str], list[str]] = defaultdict(list)
    for quant_type in dict.fromkeys(description.types.values()):  # few types have many keys
        if quant_type not in FLOAT_TYPES and not any(
            get_scheme_class(quant_type, layer_type) for layer_type in LAYER_TYPES
        ):
            keys[quant_type, "linear"] = [key for key, said in description.types.items() if said == quant_type]
    for module, quant_type in description.attention_types.items():
        if get_scheme_class(quant_type, "attention") is None:
            keys[quant_type, "attention"].append(f"{module}.{ATTENTION_TYPE}")
    errors = []
    for (quant_type, layer_type), described in keys.items():
        weights = [key for key in described if key.endswith(".weight")]
        # Tensors of a type that no weight has belong to attention.
        kind = layer_type if weights else "attention"
        where = f"{description.file}: {listing(weights or described)}"
        try:
            if quant_type in UNUSABLE:
                raise UnsupportedSchemeError(
                    f"layers of the type {quant_type!r} cannot be served: {UNUSABLE[quant_type]}",
                    where=where,
                    todo="quantise these layers as another type",
                )
            require_scheme_class(quant_type, kind, where=where)
        except UnsupportedSchemeError as error:
            errors.append(error)
    _raise_all(errors)
    if simulated := [key for key in description.types if SIMULATED_RANKS in key]:
        raise UnsupportedSchemeError(
            "layers that were quantised once for each tensor-parallel rank (simulate_tp) cannot be served: the "
            "weight of the whole layer has no scale of its own",
            where=f"{description.file}: {listing(simulated)}",
            todo="quantise the model without simulate_tp",
        )


def _absent(folder: CheckpointFolder, description: Description) -> Iterator[str]:
    # A FLOAT key without a tensor is left to the loader: writers add such keys for what they skipped, and whether the
    # model needs the tensor is known only then.
    tensors = folder.tensors
    for key, quant_type in description.types.items():
        if key not in tensors and quant_type not in FLOAT_TYPES:
            yield f"{key} is described as {quant_type}, but no file holds it"


def _absent_rotations(folder: CheckpointFolder, description: Description) -> Iterator[str]:
    """Rotations at run time have no key of their own; only the global keys tell that a layer needs one."""
    for extension in (description.keys.metadata, description.keys.optional):
        if extension is None or extension.quarot is None:
            continue
        for file in (extension.quarot.rotation_map or {}).values():
            folder.check_contained(file, description.file)
        for rotated, suffixes in (
            (extension.quarot.heads_rotation, ("heads_rotation",)),
            (extension.quarot.kronecker_rotation, ("kronecker_rotation_m", "kronecker_rotation_n")),
        ):
            names = [f"{module}.{suffix}" for module in (rotated and rotated.layers) or () for suffix in suffixes]
            yield from (
                f"{name} is needed at run time, but no file holds it" for name in names if name not in folder.tensors
            )


def _integers_as_float(folder: CheckpointFolder, description: Description) -> Iterator[str]:
    """Tensors that are FLOAT, by their key or for lack of one, and hold something else."""
    for name, tensor in folder.tensors.items():
        described = name in description.types
        if described and description.types[name] not in FLOAT_TYPES:
            continue
        suffix = name.rpartition(".")[2]
        if suffix == "weight" and not described:
            continue  # quantised weights without a key are reported by themselves
        # Other tensors of a float module may be integers, as tables of indices are.
        multiplied = suffix in {"weight", "bias"}
        if tensor.dtype in QUANTISED_DTYPES or (multiplied and not is_float(tensor.dtype)):
            said = f"is described as {description.types[name]}" if described else f"has no key in {description.file}"
            yield f"{name} {said}, but {tensor.file} holds {dtype_name(tensor.dtype)}"


def _several_types(description: Description) -> Iterator[str]:
    """Modules of whose tensors each is described as that of another linear type."""
    types = description.types
    multiplied = {t for t in set(types.values()) if t not in FLOAT_TYPES and get_scheme_class(t, "linear")}
    contradicted: dict[str, None] = {}
    for key, quant_type in types.items():
        if quant_type in multiplied and not key.endswith(".weight"):
            module = key.rpartition(".")[0]
            if types.get(f"{module}.weight", quant_type) != quant_type:
                contradicted[module] = None
    if not contradicted:
        return
    said: dict[str, list[str]] = {module: [] for module in contradicted}
    for key, quant_type in types.items():
        module, _, suffix = key.rpartition(".")
        if module in said and (suffix == "weight" or quant_type in multiplied):
            said[module].append(f"{key} is described as {quant_type}")
    yield from (", ".join(entries) for entries in said.values())


def _check_modules(folder: CheckpointFolder, description: Description) -> None:
    factors = [module.removesuffix(".div") for module, form in folder.modules.items() if form.has("mul_scale")]
    if wrapped := [module for module in factors if f"{module}.linear" in folder.modules]:
        raise smoothed(wrapped)
    unmentioned = [
        module
        for module, form in folder.modules.items()
        if form.has("weight")
        and f"{module}.weight" not in description.types
        and not is_float(form.tensors["weight"].dtype)
    ]
    if unmentioned:
        raise undescribed(unmentioned, description, folder)


def _check_forms(modules: Mapping[str, StoredForm], description: Description) -> None:
    """Check one module of every (type, form) as a linear layer; report all that fail."""
    groups: dict[tuple[str, Signature], list[str]] = defaultdict(list)
    for key, quant_type in description.types.items():
        module, _, suffix = key.rpartition(".")
        if quant_type not in FLOAT_TYPES and suffix == "weight" and module in modules:
            tensors = modules[module].tensors
            groups[quant_type, frozenset((s, t.shape, t.dtype) for s, t in tensors.items())].append(module)
    errors: list[QuantError] = []
    for (quant_type, _), members in groups.items():
        try:
            _check_form(modules[members[0]], quant_type)
        except QuantError as error:
            also = f"\n  also: {listing(members[1:])}" if len(members) > 1 else ""
            errors.append(type(error)(f"{error}{also}"))
    _raise_all(errors)


def _check_form(form: StoredForm, quant_type: str) -> None:
    scheme_class = get_scheme_class(quant_type, "linear")
    if scheme_class is None:
        return  # known for another layer type, which the engine decides
    quant = LayerQuant(quant_type, (form.module,), (form,))
    context = layer_context(LayerQuery(form.module), quant, scheme_class)
    reasons = reasons_against(scheme_class, context)
    if reasons:
        raise UnsupportedSchemeError(f"{form.module}: the type {quant_type} cannot be served", found="; ".join(reasons))
    scheme = compose(scheme_class, context)
    if isinstance(scheme, AscendLinearScheme):
        verify_stored(scheme)


def _raise_all(errors: Sequence[QuantError]) -> None:
    """Raise what was collected as one error, the first ten in full."""
    if not errors:
        return
    kind = LoadError if any(isinstance(error, LoadError) for error in errors) else type(errors[0])
    more = f"\nand {len(errors) - 10} more of this kind" if len(errors) > 10 else ""
    raise kind("\n".join(str(error) for error in errors[:10]) + more)
