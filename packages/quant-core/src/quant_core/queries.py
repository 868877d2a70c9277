"""What an engine asks a checkpoint format about a layer, and what the format answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from quant_core.schemes.context import Partition, StoredForm


@dataclass(frozen=True)
class Detection:
    """A format recognised a folder."""

    format: str
    reason: str


class Evidence(NamedTuple):
    """The entry that a decision rests on. A tuple, because large models have tens of thousands."""

    file: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key} = {self.value}"


@dataclass(frozen=True)
class LayerQuery:
    """An engine's question about one of its layers.

    Attributes:
        name: the engine's name of the layer.
        layer_type: `linear`, `moe` or `attention`.
        modules: the checkpoint modules that the layer stands for, if the engine knows them.
        packed_modules: otherwise, how the engine fuses: last component of a fused module to those of its members.
        input_size: input features over all ranks; None takes sizes from the files.
        output_sizes: output features of each member over all ranks.
        local_output_sizes: those of this rank; the same if empty.
        params_dtype: the model's dtype.
        partition: how the layer is cut.
        has_bias: whether the engine's layer has a bias.
        role: which requests the instance serves.

    """

    name: str
    layer_type: str = "linear"
    modules: tuple[str, ...] = ()
    packed_modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    input_size: int | None = None
    output_sizes: tuple[int, ...] = ()
    local_output_sizes: tuple[int, ...] = ()
    params_dtype: torch.dtype = torch.bfloat16
    partition: Partition = field(default_factory=Partition)
    has_bias: bool = False
    role: Literal["prefill", "decode", "both"] = "both"


@dataclass(frozen=True)
class LayerQuant:
    """A format's answer.

    Attributes:
        quant_type: the registered name of the scheme, None for a float layer.
        modules: the checkpoint modules that the layer is loaded from.
        stored: what the files hold for each of them.
        evidence: the entries that decided.
        reason: why a float layer is one.

    """

    quant_type: str | None
    modules: tuple[str, ...]
    stored: tuple[StoredForm, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    reason: str = ""
