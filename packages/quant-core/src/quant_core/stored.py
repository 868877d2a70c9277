"""How one checkpoint module is stored: what a format states about it, and what the files' headers say.

The words are those of compressed-tensors where it has one (`num_bits`, `type`, `strategy`, `group_size`, `symmetric`).
In every format a weight is (q - offset) · scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from quant_core.errors import RegistrationError

_CONTAINERS = {8: torch.int8, 32: torch.int32}

Strategy = Literal["tensor", "channel", "group", "block", "token", "head"]


class StoredTensor(NamedTuple):
    """What a file's header says of one tensor. A tuple, because large models have a hundred thousand."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


@dataclass(frozen=True, slots=True)
class Packing:
    """Several values in one element of the stored tensor: the first in its lowest bits.

    Attributes:
        axis: of the weight [out, in], along which neighbours share an element.
        values: in one element.
        signed: two's complement; otherwise offset binary, a value plus half of the range.

    """

    axis: Literal[0, 1]
    values: int = 2
    signed: bool = True

    def container(self, num_bits: int) -> torch.dtype:
        """The dtype of an element that holds so many values of so many bits.

        Raises:
            RegistrationError: if no element has so many bits: the format states what cannot be.

        """
        if self.values < 2 or self.values * num_bits not in _CONTAINERS:
            raise RegistrationError(
                f"a format states {self.values} values of {num_bits} bits in one element",
                expected=f"elements of {' or '.join(map(str, _CONTAINERS))} bits, with two values at least",
            )
        return _CONTAINERS[self.values * num_bits]


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How a weight is stored, in words; a format states it, a scheme never finds out from shapes.

    Also how keys and values are kept in a cache: their channels are those of a head, `head` shares a scale among them.

    Attributes:
        num_bits: of one value.
        type: of one value.
        strategy: what shares a scale: all, an output channel, a group of a channel's input features, a block.
        group_size: input features that share a scale, for the strategy `group`.
        block_structure: output and input features that share a scale, for the strategy `block`.
        symmetric: offsets are zero or absent.
        packing: several values in one element; None for one.
        offset_type: whether offsets (zero points) are stored in a floating dtype or as integers.
        offset_packing: several of them in one element.
        scale_dtype: torch.uint8 where a scale is the exponent of a power of two (MX), torch.float8_e4m3fn where it is
            a number of eight bits (NVFP4); None for a number in any wider dtype.
        outer: what shares a second scale, by which those above are multiplied: a channel (`weight_channel_scale`), a
            longer group (`weight_dual_scale`), or the whole tensor, whose `weight_global_scale` those above are
            *divided* by.
        outer_group_size: input features of the longer group.
        indexed: the group of each input feature is stored (`weight_g_idx`), instead of following from its place.

    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    strategy: Strategy = "channel"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True
    packing: Packing | None = None
    offset_type: Literal["int", "float"] = "float"
    offset_packing: Packing | None = None
    scale_dtype: torch.dtype | None = None
    outer: Literal["channel", "group", "tensor"] | None = None
    outer_group_size: int | None = None
    indexed: bool = False

    def __post_init__(self) -> None:
        sizes = {"group_size": self.group_size, "outer_group_size": self.outer_group_size}
        if wrong := {name: size for name, size in sizes.items() if size is not None and size < 1}:
            raise RegistrationError(f"a format states {wrong}", expected="at least 1, or None for all input features")
        for packing in (self.packing, self.offset_packing):
            if packing is not None:
                packing.container(self.num_bits)

    def steps(self) -> tuple[int, int]:
        """Output and input features that one element of the stored weight holds."""
        values = 1 if self.packing is None else self.packing.values
        axis = None if self.packing is None else self.packing.axis
        return (values if axis == 0 else 1, values if axis == 1 else 1)


@dataclass(frozen=True, slots=True)
class ActivationForm:
    """How a layer's input is quantised.

    Attributes:
        num_bits: of one value.
        type: of one value.
        dynamic: scales are found at run time; otherwise they are stored.
        strategy: what shares a scale.
        group_size: input features that share a scale, for the strategy `group`.
        symmetric: without a zero point.
        scale_dtype: of the scales found at run time, as `WeightForm.scale_dtype`.
        outer: `tensor` where these are divided by a stored `input_global_scale`.
        folded: what is stored of static scales has been multiplied with what is stored of the weight already:
            `deq_scale` and `quant_bias` in the place of `weight_scale` and the layer's bias.
        ties: where a value goes that lies in the middle of two codes: to the even one, or away from zero.

    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    dynamic: bool = True
    strategy: Strategy = "token"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    outer: Literal["tensor"] | None = None
    folded: bool = False
    ties: Literal["even", "away"] = "even"


#: One for all: a dictionary for each module of a large model would take a tenth of a second.
_NOTHING: Mapping[str, StoredTensor] = {}
_AS_IT_IS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class StoredForm:
    """One checkpoint module.

    Without tensors when there is no file yet (planning): then what is stated holds, and otherwise a type's usual form,
    which is what the `default` of each question stands for.

    Attributes:
        module: its name.
        tensors: what the headers say, by canonical suffix (`weight`, `weight_scale`, ...).
        weight: how the weight is stored; None where the format does not say, and for float modules.
        input: how the layer's input is quantised; None where the format does not say, or not at all.
        transforms: what is stored beside it and changes input or output: names of additions (schemes/additions).
        spelling: the format's own suffix of each canonical one that it spells otherwise, for messages.

    """

    module: str = ""
    tensors: Mapping[str, StoredTensor] = field(default_factory=lambda: _NOTHING)
    weight: WeightForm | None = None
    input: ActivationForm | None = None
    transforms: tuple[str, ...] = ()
    spelling: Mapping[str, str] = field(default_factory=lambda: _AS_IT_IS)

    def __bool__(self) -> bool:
        """False if nothing is known of the files."""
        return bool(self.tensors)

    def has(self, suffix: str, default: bool = False) -> bool:
        """Whether the module stores a tensor with this suffix; `default` if nothing is known of the files."""
        return suffix in self.tensors if self.tensors else default

    def shape(self, suffix: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape, or `default` for a tensor that is not there."""
        return self.tensors[suffix].shape if suffix in self.tensors else default

    def single(self, suffix: str) -> tuple[int, ...]:
        """The shape of a tensor that holds one value: () where the header has it so, as older writers do, else [1]."""
        return () if self.shape(suffix, (1,)) == () else (1,)

    def dtype(self, suffix: str, default: torch.dtype) -> torch.dtype:
        """The stored dtype, or `default` for a tensor that is not there."""
        return self.tensors[suffix].dtype if suffix in self.tensors else default

    def float_dtype(self, suffix: str, default: torch.dtype = torch.float32) -> torch.dtype:
        """The stored dtype if it is a floating one, else `default`: writers store scales in 32 or 16 bits."""
        dtype = self.dtype(suffix, default)
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else default

    def name_of(self, suffix: str) -> str:
        """The tensor's name in the checkpoint, whether it is there or not."""
        if suffix in self.tensors:
            return self.tensors[suffix].name
        spelled = self.spelling.get(suffix, suffix)
        return f"{self.module}.{spelled}" if self.module else spelled

    def found(self, suffix: str) -> str:
        """Tensor, file and shape, for messages; empty for a tensor that is not there."""
        tensor = self.tensors.get(suffix)
        return "" if tensor is None else f"{tensor.name} in {tensor.file} is {list(tensor.shape)}"

    def sizes(self) -> tuple[int, int] | None:
        """Input and output features, by the weight's header and what is stated of its packing; None without one."""
        shape = self.shape("weight", ())
        if len(shape) != 2:
            return None
        out_step, in_step = (self.weight or WeightForm()).steps()
        return shape[1] * in_step, shape[0] * out_step
