"""Comparing the description with the files, from metadata alone and before an engine exists."""

from collections import defaultdict
from collections.abc import Collection, Iterator

from quant_core import (
    CheckpointError,
    CheckpointFolder,
    Finding,
    LayerQuery,
    LayerResolutionError,
    PlannedFolder,
    StoredForm,
    UnsupportedSchemeError,
    get_scheme_class,
    require_scheme_class,
)
from quant_core.errors import listing
from quant_core.formats import respelled
from quant_core.judging import judge_modules
from quant_core.schemes.registry import LAYER_TYPES
from quant_modelslim.caches import quantised_caches
from quant_modelslim.description import ATTENTION_TYPE, Description
from quant_modelslim.resolve import QUANTISED_DTYPES, dtype_name, is_float, smoothed, undescribed
from quant_modelslim.siblings import examine_siblings
from quant_modelslim.stating import canonical_suffixes, stated
from quant_modelslim.type_names import ATTENTION_SCHEMES, FLOAT_TYPES, SIMULATED_RANKS, UNUSABLE
from quant_modelslim.wrapped_norms import contradictions, is_wrapped_norm


def examine(folder: CheckpointFolder, description: Description) -> Iterator[Finding]:
    """Everything that is wrong with a folder without the model. What follows from another finding is left out.

    Without weights (planning) only the description is looked at.
    """
    yield from _unknown_types(description)
    if isinstance(folder, PlannedFolder):
        yield from _unplannable(folder, description)
        return
    wrong = [
        *_absent(folder, description),
        *_absent_rotations(folder, description),
        *_integers_as_float(folder, description),
        *_several_types(description),
    ]
    places = "one place" if len(wrong) == 1 else f"{len(wrong)} places"
    for tensor, problem in wrong:
        yield Finding(
            f"{description.file} and the weight files contradict each other in {places}",
            where=str(folder.path),
            found=problem,
            todo="take description and weights from one run of the tool; finish the download",
            tensor=tensor,
            error=CheckpointError,
        )
    yield from _leaving_the_folder(folder, description)
    yield from _undescribed(folder, description)
    yield from contradictions(folder)
    try:
        quantised_caches(description, folder)
    except LayerResolutionError as error:
        yield from error.findings
    yield from examine_siblings(description)
    told = {tensor.rpartition(".")[0] for tensor, _ in wrong} | _simulated(description) | _of_unknown_types(description)
    yield from _wrong_forms(folder, description, told)


def _unplannable(folder: PlannedFolder, description: Description) -> Iterator[Finding]:
    if description.keys.group_size:
        yield Finding(
            f"{folder.path} has no weights, and {description.file} does not tell which scales are stored",
            found=f"group_size {description.keys.group_size}, which holds for some of the types only",
            expected="types with one scale per channel",
            todo="put the weight files into the folder; their headers suffice, values are not read",
            error=CheckpointError,
        )


def _unknown_types(description: Description) -> Iterator[Finding]:
    keys: dict[tuple[str, str], list[str]] = defaultdict(list)
    unknown = {t for t in set(description.types.values()) if t not in FLOAT_TYPES and not _is_known(t)}
    for key, quant_type in description.types.items() if unknown else ():
        if quant_type in unknown:
            keys[quant_type, "linear"].append(key)
    for module, quant_type in description.attention_types.items():
        if get_scheme_class(ATTENTION_SCHEMES.get(quant_type, quant_type), "attention") is None:
            keys[quant_type, "attention"].append(f"{module}.{ATTENTION_TYPE}")
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
            yield from error.findings
    if simulated := [key for key in description.types if SIMULATED_RANKS in key]:
        yield Finding(
            "layers that were quantised once for each tensor-parallel rank (simulate_tp) cannot be served: the "
            "weight of the whole layer has no scale of its own",
            where=f"{description.file}: {listing(simulated)}",
            todo="quantise the model without simulate_tp",
            error=UnsupportedSchemeError,
        )


def _is_known(quant_type: str) -> bool:
    return any(get_scheme_class(quant_type, layer_type) for layer_type in LAYER_TYPES)


def _of_unknown_types(description: Description) -> set[str]:
    """The modules with a tensor of a type that nobody registered."""
    unknown = {t for t in set(description.types.values()) if t not in FLOAT_TYPES and not _is_known(t)}
    return {key.rpartition(".")[0] for key, quant_type in description.types.items() if quant_type in unknown}


def _simulated(description: Description) -> set[str]:
    """The modules that are stored once for each rank, and those of the ranks."""
    keys = [key.rpartition(".")[0] for key in description.types if SIMULATED_RANKS in key]
    return {*keys, *(key.partition(SIMULATED_RANKS)[0] for key in keys)}


#: A tensor's name, and what is wrong with it.
Problem = tuple[str, str]


def _absent(folder: CheckpointFolder, description: Description) -> Iterator[Problem]:
    # A FLOAT key without a tensor is left to the loader: writers add such keys for what they skipped, and whether the
    # model needs the tensor is known only then.
    tensors = folder.tensors
    types = {t for t in set(description.types.values()) if t not in FLOAT_TYPES and _is_known(t)}
    for key, quant_type in description.types.items():
        if key not in tensors and quant_type in types:
            yield key, f"{key} is described as {quant_type}, but no file holds it"


def _absent_rotations(folder: CheckpointFolder, description: Description) -> Iterator[Problem]:
    """Rotations at run time have no key of their own; only the global keys tell that a layer needs one."""
    for extension in (description.keys.metadata, description.keys.optional):
        if extension is None or extension.quarot is None:
            continue
        for rotated, suffixes in (
            (extension.quarot.heads_rotation, ("heads_rotation",)),
            (extension.quarot.kronecker_rotation, ("kronecker_rotation_m", "kronecker_rotation_n")),
        ):
            names = [f"{module}.{suffix}" for module in (rotated and rotated.layers) or () for suffix in suffixes]
            yield from (
                (name, f"{name} is needed at run time, but no file holds it")
                for name in names
                if name not in folder.tensors
            )


def _leaving_the_folder(folder: CheckpointFolder, description: Description) -> Iterator[Finding]:
    for extension in (description.keys.metadata, description.keys.optional):
        quarot = None if extension is None else extension.quarot
        for file in (quarot.rotation_map or {}).values() if quarot else ():
            try:
                folder.check_contained(file, description.file)
            except CheckpointError as error:
                yield from error.findings


def _integers_as_float(folder: CheckpointFolder, description: Description) -> Iterator[Problem]:
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
            yield name, f"{name} {said}, but {tensor.file} holds {dtype_name(tensor.dtype)}"


def _several_types(description: Description) -> Iterator[Problem]:
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
    yield from ((f"{module}.weight", ", ".join(entries)) for module, entries in said.items())


def _undescribed(folder: CheckpointFolder, description: Description) -> Iterator[Finding]:
    factors = [module.removesuffix(".div") for module, form in folder.modules.items() if form.has("mul_scale")]
    if wrapped := [module for module in factors if f"{module}.linear" in folder.modules]:
        yield from smoothed(wrapped).findings
    unmentioned = [
        module
        for module, form in folder.modules.items()
        if form.has("weight")
        and f"{module}.weight" not in description.types
        and not is_float(form.tensors["weight"].dtype)
    ]
    if unmentioned and not wrapped:
        yield from undescribed(unmentioned, description, folder).findings


def _wrong_forms(folder: CheckpointFolder, description: Description, told: Collection[str]) -> Iterator[Finding]:
    """Judge the quantised modules as linear layers, but for those with which something is wrong anyway."""
    modules: list[tuple[str, StoredForm]] = []
    for key, quant_type in description.types.items():
        module, _, suffix = key.rpartition(".")
        if quant_type in FLOAT_TYPES or suffix != "weight" or module in told or module not in folder.modules:
            continue
        if get_scheme_class(quant_type, "linear") is None:
            continue  # known for another layer type, which the engine decides
        raw = folder.modules[module]
        if is_wrapped_norm(raw, folder):
            continue
        try:
            modules.append((quant_type, respelled(raw, canonical_suffixes(raw, description))))
        except CheckpointError as error:
            yield from error.findings

    def state(quant_type: str, form: StoredForm) -> StoredForm:
        return stated(form, quant_type, description, LayerQuery(form.module))

    yield from judge_modules(modules, state)
