"""How a module is stored, from the arguments of its group and from its headers.

A group says what was computed, not always how it is kept: four bits stand in a byte each or eight to an int32, whatever
the format is called. So containers are read off the dtypes of the headers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from quant_compressed_tensors.combinations import input_kind, weight_kind
from quant_core import ActivationForm, Packing, StoredForm, WeightForm
from quant_core.stored import Strategy

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

#: The format's own suffixes, and the canonical ones. The shape of a packed weight follows from its group.
SUFFIXES: Mapping[str, str | None] = {
    "weight_packed": "weight",
    "weight_zero_point": "weight_offset",
    "input_zero_point": "input_offset",
    "weight_shape": None,
}

#: Where they are absent, messages must name them too.
_ZERO_POINTS = {canonical: suffix for suffix, canonical in SUFFIXES.items() if canonical and "zero_point" in suffix}

#: What only quantised linear layers store, by canonical suffix.
_BESIDE = frozenset(
    [
        *("weight_scale", "weight_offset", "weight_global_scale", "weight_g_idx"),
        *("input_scale", "input_offset", "input_global_scale"),
    ]
)
#: What layers store whose outputs are quantised; old writers meant caches by it.
OUTPUTS = frozenset(["output_scale", "output_zero_point"])
#: What only attention layers store whose cache or query is quantised.
ATTENTION = frozenset(
    f"{part}_{kind}" for part in ("q", "k", "v", "kv") for kind in ("scale", "zero_point", "global_scale")
)

_PACKED_FORMATS = ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")


def is_quantised(form: StoredForm) -> bool:
    """Whether a module stores anything that float modules do not have."""
    return not _BESIDE.isdisjoint(form.tensors) or (form.has("weight") and not is_float_weight(form))


def is_float_weight(form: StoredForm) -> bool:
    """Whether a module stores a weight as float modules do, and no codes."""
    dtype = form.dtype("weight", torch.int8)
    return dtype.is_floating_point and dtype.itemsize > 1


def stated(form: StoredForm, scheme: "QuantizationScheme", file_format: str) -> StoredForm:
    """A module with what its group says of it.

    Args:
        form: its tensors by canonical suffix; none while planning, when the name of the format tells the container.
        scheme: the group's.
        file_format: of the whole checkpoint, for a group that has none of its own.

    """
    assert scheme.weights is not None
    packed = form.dtype("weight", torch.int8) == torch.int32
    if not form:
        packed = str(scheme.format or file_format) in _PACKED_FORMATS
    return replace(
        form,
        weight=_weight(form, scheme.weights, packed),
        input=_input(scheme.input_activations),
        spelling={**_ZERO_POINTS, **form.spelling},
    )


def _weight(form: StoredForm, args: "QuantizationArgs", packed: bool) -> WeightForm:
    strategy = _strategy(args)
    weight = WeightForm(
        num_bits=args.num_bits,
        type=args.type,
        strategy=strategy,
        group_size=args.group_size if strategy == "group" else None,
        block_structure=None if args.block_structure is None else (args.block_structure[0], args.block_structure[1]),
        symmetric=args.symmetric,
        offset_type="int",
        indexed=form.has("weight_g_idx"),
    )
    kind = weight_kind(args)
    if kind in ("mxfp8", "mxfp4"):
        weight = replace(weight, scale_dtype=torch.uint8)
    if kind == "nvfp4":
        weight = replace(weight, scale_dtype=torch.float8_e4m3fn, outer="tensor")
    if args.type == "float":
        return replace(weight, packing=Packing(1)) if args.num_bits == 4 else weight
    if args.num_bits not in (4, 8):
        return weight
    words = Packing(axis=1, values=32 // args.num_bits, signed=False)
    offsets = form.dtype("weight_offset", torch.int32 if packed else torch.int8)
    return replace(
        weight,
        packing=words if packed else None,
        offset_packing=replace(words, axis=0) if offsets == torch.int32 and not args.symmetric else None,
    )


def _strategy(args: "QuantizationArgs") -> Strategy:
    """In the words of stored forms; what else the library knows, no scheme takes."""
    return cast("Strategy", "group" if args.strategy == "tensor_group" else args.strategy)


def _input(args: "QuantizationArgs | None") -> ActivationForm | None:
    if args is None:
        return None
    kind = input_kind(args)
    scale = {"mxfp8": torch.uint8, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(kind)
    strategy = _strategy(args)
    return ActivationForm(
        num_bits=args.num_bits,
        type=args.type,
        dynamic=args.dynamic is not False,
        strategy=strategy,
        group_size=args.group_size if strategy == "group" else None,
        symmetric=args.symmetric,
        scale_dtype=scale,
        outer="tensor" if kind == "nvfp4" else None,
    )
