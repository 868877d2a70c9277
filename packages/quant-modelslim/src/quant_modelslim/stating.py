"""How msModelSlim's writers store a module, from its type, its headers and its writer.

Writers differ: older ones keep an int4 value per byte, newer ones two, along the output features or, for W4A16 with one
scale per channel, along the input features; some types keep scales in two stages. What is known of that stands here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from quant_core import (
    AscendLinearScheme,
    LayerQuery,
    LinearContext,
    LinearSizes,
    Packing,
    Shard,
    StoredForm,
    WeightForm,
    get_scheme_class,
)
from quant_core.schemes.additions import ADDITIONS
from quant_modelslim.description import Description
from quant_modelslim.type_names import CACHE_SUFFIXES, PACKED_ALONG, TRANSFORMS

#: Scales in two stages: the first one's tensors bear the usual names, those of the second a suffix.
_TWO_STAGES: dict[str, str | None] = {
    "weight_scale": "weight_channel_scale",
    "weight_offset": "weight_channel_offset",
    "weight_scale_second": "weight_scale",
    "weight_offset_second": "weight_offset",
}
_AS_IT_IS: dict[str, str | None] = {}

#: A multiple of whatever a weight is packed by.
_MANY = 1 << 16


def canonical_suffixes(form: StoredForm, description: Description) -> Mapping[str, str | None]:
    """See QuantFormat.canonical_suffixes. Types that declare their parameters themselves go by the writers' names."""
    if not form.tensors.keys().isdisjoint(CACHE_SUFFIXES):  # the attention layer's, see caches.py
        return _two_stages(form, description) | dict.fromkeys(set(CACHE_SUFFIXES).intersection(form.tensors))
    return _two_stages(form, description)


def _two_stages(form: StoredForm, description: Description) -> dict[str, str | None]:
    if "weight_scale_second" not in form.tensors and "weight_offset_second" not in form.tensors:
        return _AS_IT_IS
    scheme_class = _linear_class(description.types.get(f"{form.module}.weight", ""))
    own = scheme_class is not None and scheme_class.declares & {"get_pergroup_param", "params"}
    return _AS_IT_IS if own else _TWO_STAGES


def stated(form: StoredForm, quant_type: str, description: Description, query: LayerQuery) -> StoredForm:
    """A module with everything that its type, headers and writer tell.

    Args:
        form: its tensors by canonical suffix; none while planning.
        quant_type: its type.
        description: knows the writer.
        query: may know the sizes.

    """
    scheme_class = _linear_class(quant_type)
    if scheme_class is None:
        return form
    found = [a.name for a in ADDITIONS if any(form.has(suffix) for suffix in a.suffixes)]
    transforms = tuple(dict.fromkeys([*found, *TRANSFORMS.get(quant_type, ())]))
    sizes = query.sizes if isinstance(query.sizes, LinearSizes) else LinearSizes()
    if scheme_class.stores is None:
        weight: WeightForm | None = _declared(scheme_class, form)
    elif scheme_class.stores.type == "float":
        weight = _outer_groups(form, scheme_class.stores, sizes)
    else:
        weight = _integers(form, scheme_class.stores, quant_type, description, sizes)
        if "get_weight" in scheme_class.declares and (own := _declared(scheme_class, form)) is not None:
            weight = replace(weight, num_bits=own.num_bits, packing=own.packing)
    return replace(form, weight=weight, input=scheme_class.activation, transforms=transforms)


def _linear_class(quant_type: str) -> type[AscendLinearScheme] | None:
    found = get_scheme_class(quant_type, "linear")
    return found if found is not None and issubclass(found, AscendLinearScheme) else None


def _integers(
    form: StoredForm, usual: WeightForm, quant_type: str, description: Description, sizes: LinearSizes
) -> WeightForm:
    packing = _packing(form, usual, quant_type, description, sizes)
    weight = replace(usual, packing=packing)
    if form.spelling.get("weight_scale") == "weight_scale_second":
        weight = replace(weight, outer="channel", offset_type="int")  # the tool writes the second offsets as int64
    scale, told = form.shape("weight_scale", ()), replace(form, weight=weight).sizes()
    if told is None or len(scale) != 2 or scale[1] < 2 or told[0] < 1:
        return weight
    return replace(weight, strategy="group", group_size=-(-told[0] // scale[1]))


def _packing(
    form: StoredForm, usual: WeightForm, quant_type: str, description: Description, sizes: LinearSizes
) -> Packing | None:
    """None for one value per byte."""
    if usual.num_bits != 4:
        return None
    newest = PACKED_ALONG.get(quant_type)
    if not form:
        return _planned_packing(newest, sizes)
    weight, scale = form.shape("weight", ()), form.shape("weight_scale", ())
    if form.has("weight_channel_scale"):
        scale = form.shape("weight_channel_scale", ())
    if len(weight) != 2 or len(scale) != 2:
        return None
    if 2 * weight[0] == scale[0]:
        return Packing(0)
    inputs = _inputs(form) if sizes.input_size is None else sizes.input_size
    if newest != 1 or scale[1] != 1 or weight[1] == inputs:
        return None
    # One scale per channel, and nothing else in the headers tells. The writers that pack give their version.
    packed = 2 * weight[1] == inputs if inputs is not None else description.keys.version is not None
    return Packing(1) if packed else None


def _planned_packing(newest: Literal[0, 1] | None, sizes: LinearSizes) -> Packing | None:
    """As the newest writer packs, if two values share a byte at all."""
    features = [sizes.output_sizes, () if sizes.input_size is None else (sizes.input_size,)]
    if newest is None or any(size % 2 for size in features[newest]):
        return None
    return Packing(newest)


def _inputs(form: StoredForm) -> int | None:
    """The input features, if a matrix beside the weight tells them."""
    factor, left, right = (
        form.shape(name, ()) for name in ("svd_lowrank_l1", "kronecker_rotation_m", "kronecker_rotation_n")
    )
    if len(factor) == 2:
        return factor[1]
    return left[0] * right[0] if left and right else None


def _outer_groups(form: StoredForm, usual: WeightForm, sizes: LinearSizes) -> WeightForm:
    """Scales above the powers of two, of groups of any length; planning, of one where the usual groups do not fit."""
    if usual.outer != "group" or usual.outer_group_size is None:
        return usual
    if not form:
        fits = sizes.input_size is None or sizes.input_size % usual.outer_group_size == 0
        return usual if fits else replace(usual, outer_group_size=None)
    shape, told = form.shape("weight_dual_scale", ()), replace(form, weight=usual).sizes()
    if len(shape) != 3 or told is None or shape[1] < 1 or told[0] < 1:
        return usual
    return replace(usual, outer_group_size=-(-told[0] // shape[1]))


def _declared(scheme_class: type[AscendLinearScheme], form: StoredForm) -> WeightForm | None:
    """How the weight of a type that declares its parameters itself is packed, by what it declares of a large module."""
    container = {torch.int8: 8, torch.uint8: 8, torch.int32: 32}
    shard = Shard(form.module, _MANY, _MANY)
    context = LinearContext(
        name=form.module, shards=(shard,), input_size=_MANY, params_dtype=torch.bfloat16, stored=(form,)
    )
    try:
        param = scheme_class.create(context).params(_MANY, _MANY).get("weight")
    except Exception:  # a stranger's code, asked for a size that its layers may never have
        return None
    if param is None or len(param.shape) != 2 or param.dtype not in container:
        return None
    steps = {0: _MANY // max(1, param.shape[0]), 1: _MANY // max(1, param.shape[1])}
    packed = {axis: step for axis, step in steps.items() if step > 1}
    for axis, step in packed.items():
        bits = container[param.dtype] // step
        if len(packed) == 1 and bits in (4, 8):
            return WeightForm(num_bits=bits, packing=Packing(axis, values=step))  # type: ignore[arg-type]
    return None if packed else WeightForm()
