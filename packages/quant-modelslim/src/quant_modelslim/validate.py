"""Comparing the description with the files, from metadata alone and before an engine exists."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from quant_core import (
    CheckpointError,
    CheckpointFolder,
    LoadError,
    QuantError,
    StoredForm,
    UnsupportedSchemeError,
    get_scheme_class,
    require_scheme_class,
)
from quant_core.errors import listing
from quant_core.formats import LayerQuant, LayerQuery, layer_context
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.registry import LAYER_TYPES
from quant_core.schemes.verify import verify_stored
from quant_modelslim.description import FLOAT, Description
from quant_modelslim.resolve import QUANTISED_DTYPES, TYPE_KEYS, module_type

#: A module's form without its name: modules of equal signature need one check.
Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def validate(folder: CheckpointFolder, description: Description) -> None:
    """Check everything that does not need the model.

    Raises:
        UnsupportedSchemeError: lists the layers of each type that nobody registered.
        CheckpointError: lists described tensors that are absent, and int8 tensors that are described as FLOAT.
        LoadError: lists modules whose tensors are not those of their type.

    """
    _check_types(description)
    problems = [*_absent(folder, description), *_integers_as_float(folder, description)]
    if problems:
        raise CheckpointError(
            f"{description.file} and the weight files contradict each other in {len(problems)} places",
            where=folder.path,
            found="\n    ".join(problems[:20]),
            todo="take description and weights from one run of the tool; finish the download",
        )
    for module in folder.modules:
        if folder.modules[module].has("weight"):
            module_type(description, folder.modules, module)
    _check_forms(folder.modules, description)


def _check_types(description: Description) -> None:
    layers: dict[str, list[str]] = defaultdict(list)
    for key, quant_type in description.types.items():
        if quant_type != FLOAT:
            layers[quant_type].append(key)
    for module, quant_type in description.attention_types.items():
        layers[quant_type].append(f"{module}.quant_type")
    for quant_type, keys in layers.items():
        if any(get_scheme_class(quant_type, layer_type) for layer_type in LAYER_TYPES):
            continue
        weights = [key for key in keys if key.endswith(".weight")]
        layer_type = "linear" if weights else "attention"
        require_scheme_class(quant_type, layer_type, where=f"{description.file}: {listing(weights or keys)}")


def _absent(folder: CheckpointFolder, description: Description) -> Iterator[str]:
    # A FLOAT key without a tensor is left to the loader: writers add such keys for what they skipped, and whether the
    # model needs the tensor is known only then.
    for key, quant_type in description.types.items():
        if quant_type != FLOAT and key not in folder.tensors:
            yield f"{key} is described as {quant_type}, but no file holds it"


def _integers_as_float(folder: CheckpointFolder, description: Description) -> Iterator[str]:
    for key, quant_type in description.types.items():
        tensor = folder.tensors.get(key)
        if quant_type == FLOAT and tensor is not None and key.endswith(".weight") and tensor.dtype in QUANTISED_DTYPES:
            yield f"{key} is described as FLOAT, but {tensor.file} holds {str(tensor.dtype).removeprefix('torch.')}"


def _check_forms(modules: Mapping[str, StoredForm], description: Description) -> None:
    """Check one module of every (type, form) as a linear layer; report all that fail."""
    groups: dict[tuple[str, Signature], list[str]] = defaultdict(list)
    for key, quant_type in description.types.items():
        module, _, last = key.rpartition(".")
        if quant_type != FLOAT and last == TYPE_KEYS[0] and module in modules:
            form = modules[module]
            signature = tuple(sorted((s, t.shape, t.dtype) for s, t in form.tensors.items()))  # type: ignore[type-var]
            groups[quant_type, signature].append(module)
    errors: list[QuantError] = []
    for (quant_type, _), members in groups.items():
        try:
            _check_form(modules[members[0]], quant_type)
        except QuantError as error:
            also = f"\n  also: {listing(members[1:])}" if len(members) > 1 else ""
            errors.append(type(error)(f"{error}{also}"))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = LoadError if any(isinstance(error, LoadError) for error in errors) else UnsupportedSchemeError
        raise kind("\n".join(str(error) for error in errors[:10]))


def _check_form(form: StoredForm, quant_type: str) -> None:
    scheme_class = get_scheme_class(quant_type, "linear")
    if scheme_class is None:
        return  # known for another layer type, which the engine decides
    quant = LayerQuant(quant_type, (form.module,), (form,))
    context = layer_context(LayerQuery(form.module), quant, scheme_class)
    reasons = scheme_class.can_serve(context)
    if reasons:
        raise UnsupportedSchemeError(f"{form.module}: the type {quant_type} cannot be served", found="; ".join(reasons))
    scheme = scheme_class.create(context)
    if isinstance(scheme, AscendLinearScheme):
        verify_stored(scheme)
