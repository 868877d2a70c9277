"""What an engine asks a checkpoint format about a layer, and what the format answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from quant_core.schemes.context import AttentionSizes, ExpertSizes, LinearSizes, Partition, Role
from quant_core.stored import StoredForm


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
        layer_class: the class of the engine's module in the words of configs, whose targets may name it: `Linear`,
            `lm_head`, `Embedding`, `Attention`, or the name of a class of experts.
        modules: the checkpoint modules that the layer stands for, if the engine knows them.
        experts: of a layer of experts, the modules of every expert over all ranks, by half (`w13_`, `w2_`), expert and
            member.
        packed_modules: otherwise, how the engine fuses: last component of a fused module to those of its members.
        sizes: of the kind that the layer is of; None takes those of a linear layer from the files.
        params_dtype: the model's dtype.
        partition: how the layer is cut.
        has_bias: whether the engine's layer has a bias.
        role: which requests the instance serves.
        values_later: whether the first values are made up and real ones come by a reload.

    """

    name: str
    layer_type: str = "linear"
    modules: tuple[str, ...] = ()
    experts: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    packed_modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sizes: LinearSizes | ExpertSizes | AttentionSizes | None = None
    params_dtype: torch.dtype = torch.bfloat16
    partition: Partition = field(default_factory=Partition)
    has_bias: bool = False
    role: Role = "both"
    values_later: bool = False
    layer_class: str = "Linear"


@dataclass(frozen=True)
class LayerQuant:
    """A format's answer.

    Attributes:
        quant_type: the registered name of the scheme, None for a float layer.
        modules: the checkpoint modules that the layer is loaded from.
        stored: what the files hold for each of them, and how, as the format states it.
        evidence: the entries that decided.
        reason: why a float layer is one.
        halves: of a layer of quantised experts, the answer about each half; `quant_type` then names the types of both.

    """

    quant_type: str | None
    modules: tuple[str, ...]
    stored: tuple[StoredForm, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    reason: str = ""
    halves: Mapping[str, "LayerQuant"] = field(default_factory=dict)
