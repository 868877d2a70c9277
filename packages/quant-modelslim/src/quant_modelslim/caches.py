"""Quantised key/value caches: scales and offsets that lie beside the projections of keys and values.

They belong to the attention layer, not to the projections: the linear layers are served without them.
"""

from collections.abc import Mapping

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
    claimed = next((t for t in (description.keys.kv_cache_type, description.keys.kv_quant_type) if t), None)
    if claimed and not tensors and folder.modules:
        raise LayerResolutionError(
            f"{description.file} claims a key/value cache of the type {claimed!r}, and the files hold no scale of one",
            where=str(folder.path),
            expected=f"tensors such as model.layers.0.self_attn.k_proj.{CACHE_SUFFIXES[0]}",
            todo="take description and weights from one run of the tool",
        )
    return {attention: _cache(attention, found, description) for attention, found in tensors.items()}


def _cache(attention: str, tensors: dict[str, StoredTensor], description: Description) -> LayerQuant:
    if lacking := [name for name in ("k_scale", "v_scale") if name not in tensors]:
        raise LayerResolutionError(
            f"{attention}: the scales of its cache are only partly there",
            found=listing(tensor.name for tensor in tensors.values()),
            expected=f"also {listing(lacking)}",
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
    computed = description.attention_types.get(attention)
    if computed is not None:
        entry = Evidence(description.file, f"{attention}.{ATTENTION_TYPE}", computed)
        form = StoredForm(attention, tensors, weight=WeightForm(strategy="tensor"))
        return LayerQuant(ATTENTION_SCHEMES.get(computed, computed), (attention,), (form,), (entry, *evidence))
    symmetric = not any(name.endswith("_offset") for name in tensors)
    form = StoredForm(attention, tensors, weight=WeightForm(strategy="channel", symmetric=symmetric))
    return LayerQuant(evidence[0].value, (attention,), (form,), tuple(evidence))
