"""From the arguments of a group to the scheme that computes it: the one table of combinations."""

from typing import TYPE_CHECKING

from quant_core import UnsupportedSchemeError
from quant_core.microscaling import BLOCK

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_UINT8 = "torch.uint8"

_OTHER_INTEGERS = "integer (neither 4 nor 8 bits)"
_OTHER_FLOATS = "float (neither 4, 6 nor 8 bits)"

#: The scheme for each kind of weights and of inputs.
TYPES: dict[tuple[str, str], str] = {
    ("int8", "none"): "W8A16",
    ("int8", "int8 static"): "W8A8",
    ("int8", "int8 per token"): "W8A8_DYNAMIC",
    ("int4", "none"): "W4A16",
    ("int4", "int8 per token"): "W4A8_DYNAMIC",
    ("int4", "int4 per token"): "W4A4_DYNAMIC",
    ("int4", "fp8 per token"): "W4AFP8_DYNAMIC",
    ("fp8", "none"): "WFP8A16",
    ("fp8", "fp8 static"): "WFP8AFP8",
    ("fp8", "fp8 per token"): "WFP8AFP8_DYNAMIC",
    ("fp8 in blocks", "none"): "WFP8A16",
    ("fp8 in blocks", "fp8 per token"): "WFP8AFP8_BLOCK_DYNAMIC",
    ("fp8 in blocks", "fp8 per token and group"): "WFP8AFP8_BLOCK_DYNAMIC",
    ("mxfp8", "none"): "W8A16_MXFP8",
    ("mxfp8", "mxfp8"): "W8A8_MXFP8",
    ("mxfp4", "none"): "W4A16_MXFP4",
    ("mxfp4", "mxfp4"): "W4A4_MXFP4",
    ("mxfp4", "mxfp8"): "W4A8_MXFP",
    ("mxfp4", "fp8 per token and group"): "W4A8_MXFP4_FP8_DYNAMIC",
    ("nvfp4", "none"): "W4A16_NVFP4",
    ("nvfp4", "nvfp4"): "W4A4_NVFP4",
}

#: Why a kind of weights or inputs is not served beside anything.
REFUSED: dict[str, str] = {
    _OTHER_INTEGERS: "no operator takes weights of so many bits; quantise to 4 or 8 bits",
    _OTHER_FLOATS: "no operator takes them; quantise to 4 or 8 bits",
    "mxfp6": "no operator takes six bits; quantise to MXFP8 or MXFP4",
    "fp8 in groups": "neither a writer's preset nor an operator has them; quantise per channel, in blocks or to MXFP8",
    "static scales of groups or blocks of inputs": "no writer stores them",
    "dynamic scales of whole tensors": "a request's numbers would depend on what else is in its batch; quantise inputs "
    "per token",
}


def quant_type(weights: "QuantizationArgs | None", inputs: "QuantizationArgs | None") -> str:
    """The registered name of the scheme for a group.

    Raises:
        UnsupportedSchemeError: if there is none; names the combination and the kinds of inputs that are served.

    """
    kinds = weight_kind(weights), input_kind(inputs)
    found = TYPES.get(kinds)
    if found is None:
        served = [other for weight, other in TYPES if weight == kinds[0]]
        raise UnsupportedSchemeError(
            f"no scheme has {kinds[0]} weights and {kinds[1]} inputs",
            found=next((f"{kind}: {REFUSED[kind]}" for kind in kinds if kind in REFUSED), None),
            expected=f"with such weights, inputs of the kind {', '.join(served)}" if served else None,
            todo="quantise the model to one of the combinations in the README of quant-compressed-tensors",
        )
    return found


def weight_kind(args: "QuantizationArgs | None") -> str:
    """The kind of a group's weights, in the words of the table."""
    if args is None:
        return "float"
    if args.type == "int":
        return f"int{args.num_bits}" if args.num_bits in (4, 8) else _OTHER_INTEGERS
    if args.num_bits not in (4, 8):
        return "mxfp6" if args.num_bits == 6 else _OTHER_FLOATS
    if args.num_bits == 4:
        return "nvfp4" if args.group_size == 16 else "mxfp4"
    if args.strategy == "block":
        return "fp8 in blocks"
    if args.strategy in ("group", "tensor_group"):
        return "mxfp8" if args.group_size == BLOCK else "fp8 in groups"
    return "fp8"


def input_kind(args: "QuantizationArgs | None") -> str:
    """The kind of a group's inputs, in the words of the table."""
    if args is None:
        return "none"
    if args.type == "float" and args.num_bits != 8:
        return weight_kind(args)
    element = f"{'int' if args.type == 'int' else 'fp'}{args.num_bits}"
    if args.dynamic is False:
        grouped = args.strategy != "tensor"
        return "static scales of groups or blocks of inputs" if grouped else f"{element} static"
    if args.strategy == "tensor":
        return "dynamic scales of whole tensors"
    if args.strategy == "group":
        return "mxfp8" if (element, args.group_size) == ("fp8", BLOCK) else f"{element} per token and group"
    return f"{element} per token"
