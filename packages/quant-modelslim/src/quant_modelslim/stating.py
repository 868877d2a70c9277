"""How msModelSlim's writers store a module, from its type, its headers and its writer.

Writers differ: older ones keep an int4 value per byte, newer ones two, along the output features or, for W4A16 with one
scale per channel, along the input features; some types keep scales in two stages. What is known of that stands here.
"""

from collections.abc import Mapping
from dataclasses import replace

from quant_core import (
    AscendLinearScheme,
    LayerQuery,
    LinearSizes,
    Packing,
    StoredForm,
    WeightForm,
    get_scheme_class,
)
from quant_core.schemes.additions import ADDITIONS
from quant_modelslim.description import Description
from quant_modelslim.type_names import PACKED_ALONG, TRANSFORMS

#: Scales in two stages: the first one's tensors bear the usual names, those of the second a suffix.
_TWO_STAGES: Mapping[str, str | None] = {
    "weight_scale": "weight_channel_scale",
    "weight_offset": "weight_channel_offset",
    "weight_scale_second": "weight_scale",
    "weight_offset_second": "weight_offset",
}
_AS_IT_IS: Mapping[str, str | None] = {}


def canonical_suffixes(form: StoredForm, description: Description) -> Mapping[str, str | None]:
    """See QuantFormat.canonical_suffixes. Types that declare their parameters themselves go by the writers' names."""
    if "weight_scale_second" not in form.tensors:
        return _AS_IT_IS
    scheme_class = get_scheme_class(description.types.get(f"{form.module}.weight", ""), "linear")
    return _AS_IT_IS if getattr(scheme_class, "stores", True) is None else _TWO_STAGES


def stated(form: StoredForm, quant_type: str, description: Description, query: LayerQuery) -> StoredForm:
    """A module with everything that its type, headers and writer tell.

    Args:
        form: its tensors by canonical suffix; none while planning.
        quant_type: its type.
        description: knows the writer.
        query: may know the sizes.

    """
    scheme_class = get_scheme_class(quant_type, "linear")
    if scheme_class is None or not issubclass(scheme_class, AscendLinearScheme):
        return form
    usual, inputs = scheme_class.stores, query.sizes.input_size if isinstance(query.sizes, LinearSizes) else None
    weight = None if usual is None else _weight(form, usual, quant_type, description, inputs)
    found = [a.name for a in ADDITIONS if any(form.has(suffix) for suffix in a.suffixes)]
    transforms = tuple(dict.fromkeys([*found, *TRANSFORMS.get(quant_type, ())]))
    return replace(form, weight=weight, input=scheme_class.activation, transforms=transforms)


def _weight(
    form: StoredForm, usual: WeightForm, quant_type: str, description: Description, inputs: int | None
) -> WeightForm:
    if usual.type == "float":
        return _outer_groups(form, usual, inputs)
    packing = _packing(form, usual, quant_type, description, inputs)
    weight = replace(usual, packing=packing, outer="channel" if form.has("weight_channel_scale") else None)
    scale, sizes = form.shape("weight_scale", ()), replace(form, weight=weight).sizes()
    if sizes is None or len(scale) != 2 or scale[1] < 2:
        return weight
    return replace(weight, strategy="group", group_size=-(-sizes[0] // scale[1]))


def _packing(
    form: StoredForm, usual: WeightForm, quant_type: str, description: Description, inputs: int | None
) -> Packing | None:
    """None for one value per byte."""
    if usual.num_bits != 4:
        return None
    newest = PACKED_ALONG.get(quant_type)
    if not form:  # planning: as the newest writer would, if two values share a byte at all
        odd = newest == 1 and inputs is not None and inputs % 2
        return None if newest is None or odd else Packing(newest)
    weight, scale = form.shape("weight", ()), form.shape("weight_scale", ())
    if len(weight) != 2 or len(scale) != 2:
        return None
    if 2 * weight[0] == scale[0]:
        return Packing(0)
    if newest != 1 or scale[1] != 1 or weight[1] == inputs:
        return None
    # One scale per channel, and nothing else in the headers tells. The writers that pack give their version.
    packed = 2 * weight[1] == inputs if inputs is not None else description.keys.version is not None
    return Packing(1) if packed else None


def _outer_groups(form: StoredForm, usual: WeightForm, inputs: int | None) -> WeightForm:
    """Scales above the powers of two, of groups of any length; planning, of one where the usual groups do not fit."""
    if usual.outer != "group" or usual.outer_group_size is None:
        return usual
    if not form:
        return replace(usual, outer_group_size=None) if inputs and inputs % usual.outer_group_size else usual
    shape, sizes = form.shape("weight_dual_scale", ()), replace(form, weight=usual).sizes()
    if len(shape) != 3 or sizes is None or shape[1] < 1:
        return usual
    return replace(usual, outer_group_size=-(-sizes[0] // shape[1]))
