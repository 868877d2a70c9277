"""Quantised key/value caches: scales and offsets that lie beside the projections of keys and values.

They belong to the attention layer, not to the projections: the linear layers are served without them.
"""

from collections.abc import Collection, Mapping

from quant_core import (
    CheckpointFolder,
    Evidence,
    LayerQuant,
    LayerResolutionError,
    StoredForm,
    StoredTensor,
    WeightForm,
)
from quant_core.errors import listing
from quant_modelslim.description import ATTENTION_TYPE, Description
from quant_modelslim.type_names import ATTENTION_SCHEMES, CACHE_SUFFIXES, FLOAT_TYPES

_PROJECTIONS = {"k_proj": "k", "v_proj": "v"}

#: Below an attention module whose query, keys and values are quantised; in latent attention both last are the latent.
_COMPUTED = {"fa_q": "q", "fa_k": "k", "fa_v": "v"}


def quantised_caches(description: Description, folder: CheckpointFolder) -> Mapping[str, LayerQuant]:
    """The caches by attention module; see QuantFormat.caches.

    Raises:
        LayerResolutionError: if only keys or only values have scales, or a type is claimed and no scale is there.

    """
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for module, form in folder.modules.items():
        attention, _, last = module.rpartition(".")
        part = _PROJECTIONS.get(last) or _COMPUTED.get(last)
        for suffix in (CACHE_SUFFIXES if last in _PROJECTIONS else ("scale", "offset")) if part else ():
            if suffix in form.tensors:
                tensors.setdefault(attention, {})[f"{part}_{suffix.rpartition('_')[2]}"] = form.tensors[suffix]
    if folder.modules:
        _check_claims(description, folder, tensors)
    return {attention: _cache(attention, found, description) for attention, found in tensors.items()}


def _check_claims(description: Description, folder: CheckpointFolder, tensors: Collection[str]) -> None:
    """See that what is said of the whole model, and of attention modules, is said of scales that are there."""
    keys = description.keys
    claims = {key: getattr(keys, key) for key in ("kv_cache_type", "kv_quant_type", "fa_quant_type")}
    found = [] if tensors else [f"{key}: {said!r}" for key, said in claims.items() if said]
    expected = (
        "fa_k.scale" if not (claims["kv_cache_type"] or claims["kv_quant_type"]) else f"k_proj.{CACHE_SUFFIXES[0]}"
    )
    lacking = [module for module in description.attention_types if module not in tensors]
    if lacking:
        expected = "fa_k.scale"
        found = [f"{module}.{ATTENTION_TYPE}: {description.attention_types[module]!r}" for module in lacking]
    if found:
        raise LayerResolutionError(
            f"{description.file} claims a quantised key/value cache, and the files hold no scale of one",
            where=str(folder.path),
            found=listing(found),
            expected=f"tensors such as {lacking[0] if lacking else 'model.layers.0.self_attn'}.{expected}",
            todo="take description and weights from one run of the tool",
        )


def _cache(attention: str, tensors: dict[str, StoredTensor], description: Description) -> LayerQuant:
    kinds = dict.fromkeys(["scale", *(name.partition("_")[2] for name in tensors)])
    if lacking := [name for kind in kinds for name in (f"k_{kind}", f"v_{kind}") if name not in tensors]:
        raise LayerResolutionError(
            f"{attention}: the scales of its cache are only partly there",
            found=listing(tensor.name for tensor in tensors.values()),
            expected=f"also {listing(_called(attention, name, tensors) for name in lacking)}",
            todo="finish the download, or take description and weights from one run of the tool",
            layer=attention,
        )
    evidence = []
    for tensor in tensors.values():
        said = description.types.get(tensor.name)
        if said is not None and said not in FLOAT_TYPES:
            evidence.append(Evidence(description.file, tensor.name, said))
    if not evidence:
        tensor = tensors["k_scale"]
        raise LayerResolutionError(
            f"{description.file} does not say of which type the cache of {attention} is",
            found=f"{tensor.name} in {tensor.file}",
            expected=f"the key {tensor.name}",
            todo="take description and weights from one run of the tool",
            layer=attention,
        )
    if len({entry.value for entry in evidence}) > 1:
        raise LayerResolutionError(
            f"{description.file} gives the cache of {attention} several types",
            found=listing(f"{entry.key} is {entry.value}" for entry in evidence),
            expected="one type for all of its tensors",
            todo="take description and weights from one run of the tool",
            layer=attention,
        )
    computed = description.attention_types.get(attention)
    if computed is not None:
        entry = Evidence(description.file, f"{attention}.{ATTENTION_TYPE}", computed)
        form = StoredForm(attention, tensors, weight=WeightForm(strategy="tensor"))
        return LayerQuant(ATTENTION_SCHEMES.get(computed, computed), (attention,), (form,), (entry, *evidence))
    symmetric = not any(name.endswith("_offset") for name in tensors)
    form = StoredForm(attention, tensors, weight=WeightForm(strategy="channel", symmetric=symmetric))
    return LayerQuant(evidence[0].value, (attention,), (form,), tuple(evidence))


def _called(attention: str, name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """What the checkpoint would call a tensor that it lacks, beside those that it has."""
    part, _, kind = name.partition("_")
    latent = any(tensor.name.split(".")[-2] in _COMPUTED for tensor in tensors.values())
    return f"{attention}.fa_{part}.{kind}" if latent else f"{attention}.{part}_proj.kv_cache_{kind}"
