"""What a scheme is told about the layer that it serves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch


class StoredTensor(NamedTuple):
    """What a file's header says of one tensor. A tuple, because large models have a hundred thousand."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


#: One for all: a dictionary for each module of a large model would take a tenth of a second.
_NO_TENSORS: Mapping[str, StoredTensor] = {}


@dataclass(frozen=True, slots=True)
class StoredForm:
    """The tensors of one checkpoint module by canonical suffix (`weight`, `weight_scale`, ...).

    Empty when there is no file yet (planning): then a type's usual form holds, which is what the `default` of each
    question stands for.
    """

    module: str = ""
    tensors: Mapping[str, StoredTensor] = field(default_factory=lambda: _NO_TENSORS)

    def __bool__(self) -> bool:
        """False if nothing is known of the files."""
        return bool(self.tensors)

    def has(self, suffix: str, default: bool = False) -> bool:
        """Whether the module stores a tensor with this suffix; `default` if nothing is known of the files."""
        return suffix in self.tensors if self.tensors else default

    def shape(self, suffix: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape, or `default` for a tensor that is not there."""
        return self.tensors[suffix].shape if suffix in self.tensors else default

    def dtype(self, suffix: str, default: torch.dtype) -> torch.dtype:
        """The stored dtype, or `default` for a tensor that is not there."""
        return self.tensors[suffix].dtype if suffix in self.tensors else default

    def float_dtype(self, suffix: str, default: torch.dtype = torch.float32) -> torch.dtype:
        """The stored dtype if it is a floating one, else `default`: writers store scales in 32 or 16 bits."""
        dtype = self.dtype(suffix, default)
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else default


@dataclass(frozen=True)
class Shard:
    """One member of a (possibly fused) layer.

    Attributes:
        name: the checkpoint module that it is loaded from. A module that is fused on disk already is named by each
            member cut from it.
        output_size: output features over all ranks.
        local_output_size: output features on this rank.

    """

    name: str
    output_size: int
    local_output_size: int


@dataclass(frozen=True)
class Partition:
    """How a layer is cut over tensor-parallel ranks.

    Attributes:
        kind: which features are cut: output (column), input (row), none (replicated).
        rank: this rank.
        size: how many ranks there are.
        max_over_ranks: element-wise maximum over the ranks of a row-parallel layer, if activations are to be quantised
            as on one rank (*exact TP*). None: each rank quantises its slice by itself, as on an NPU.

    """

    kind: Literal["column", "row", "replicated"] = "replicated"
    rank: int = 0
    size: int = 1
    max_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def input_parts(self) -> int:
        """Into how many parts the input features are cut."""
        return self.size if self.kind == "row" else 1


@dataclass(frozen=True)
class LayerContext:
    """One layer as a scheme sees it.

    Attributes:
        name: the engine's name of the layer, for messages.
        layer_type: `linear`, `moe` or `attention`.
        shards: one per member, in the order of their rows.
        input_size: input features over all ranks.
        params_dtype: the model's dtype.
        stored: one StoredForm per shard.
        partition: how the layer is cut.
        has_bias: whether the engine's layer has a bias, which it then hands to `apply`.
        role: which requests the instance serves.

    """

    name: str
    layer_type: str
    shards: tuple[Shard, ...]
    input_size: int
    params_dtype: torch.dtype
    stored: tuple[StoredForm, ...] = ()
    partition: Partition = Partition()
    has_bias: bool = False
    role: Literal["prefill", "decode", "both"] = "both"

    @property
    def form(self) -> StoredForm:
        """The stored form that all members share; empty while planning.

        `verify_stored` makes sure that the members agree, so schemes may decide by the first one.
        """
        return self.stored[0] if self.stored else StoredForm()

    @property
    def output_size(self) -> int:
        """Output features over all members and ranks."""
        return sum(shard.output_size for shard in self.shards)
