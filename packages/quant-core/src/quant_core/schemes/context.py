"""What a scheme is told about the layer that it serves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from quant_core.stored import StoredForm

Role = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class LinearSizes:
    """Sizes of a linear layer.

    Attributes:
        input_size: input features over all ranks; None takes them from the files.
        output_sizes: output features of each member over all ranks; none takes them from the files.
        local_output_sizes: those of this rank; the same if empty.

    """

    input_size: int | None = None
    output_sizes: tuple[int, ...] = ()
    local_output_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a layer of routed experts.

    Attributes:
        hidden_size: features of a token.
        intermediate_size: features between the two halves of an expert, over all ranks.
        num_experts: experts over all ranks.
        local_experts: the global numbers of this rank's experts, in the order in which they are held.
        activation: what lies between the halves, by the name that activations.py gives it.
        limit: of the activation: how far its inputs are clipped; None for not at all.
        alpha: of the activation: the factor inside its sigmoid.
        beta: of the activation: what is added to its linear part.
        weight_on_input: whether a token is multiplied by its router's weight before the experts, not after them.

    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    local_experts: tuple[int, ...] = ()
    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    weight_on_input: bool = False


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of an attention layer.

    Attributes:
        num_heads: query heads over all ranks.
        num_kv_heads: key/value heads over all ranks.
        head_size: features of a query and key head.
        value_head_size: features of a value head.
        local_heads: query and key/value heads on this rank.
        first_kv_head: the first of these key/value heads, counted over all ranks.
        latent: whether keys and values are one latent vector for all heads (MLA). It counts as one key/value head,
            whose head size is the latent's rank; the rotary part beside it has the size of a value.

    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_head_size: int
    local_heads: tuple[int, int]
    first_kv_head: int = 0
    latent: bool = False


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


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """One layer as a scheme sees it, whatever its kind.

    Attributes:
        layer_type: `linear`, `moe` or `attention`.
        name: the engine's name of the layer, for messages.
        params_dtype: the model's dtype.
        stored: the checkpoint modules that the layer is loaded from; empty while planning.
        partition: how the layer is cut.
        role: which requests the instance serves.
        values_later: whether the first values that are processed are made up and real ones come by a reload. Compiled
            code then sees the made-up ones, so nothing that it bakes in may depend on values.

    """

    layer_type: ClassVar[str]
    name: str
    params_dtype: torch.dtype
    stored: tuple[StoredForm, ...] = ()
    partition: Partition = Partition()
    role: Role = "both"
    values_later: bool = False

    @property
    def form(self) -> StoredForm:
        """The stored form that all modules share; empty while planning.

        `verify_stored` makes sure that they agree, so schemes may decide by the first one.
        """
        return self.stored[0] if self.stored else StoredForm()


@dataclass(frozen=True, kw_only=True)
class LinearContext(LayerContext):
    """A linear layer, or a stack of linear layers of one kind under a leading axis, as experts are.

    Attributes:
        shards: one per member, in the order of their rows. In a stack, those of its first layer.
        input_size: input features over all ranks.
        has_bias: whether the engine's layer has a bias, which it then hands to `apply`.
        stack: of a stack, the modules of each of its layers, in the order of the members.

    `stored` has one form per shard; in a stack one per module, layer by layer.
    """

    layer_type: ClassVar[str] = "linear"
    shards: tuple[Shard, ...]
    input_size: int
    has_bias: bool = False
    stack: tuple[tuple[str, ...], ...] = ()

    @property
    def output_size(self) -> int:
        """Output features over all members and ranks."""
        return sum(shard.output_size for shard in self.shards)

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """The checkpoint modules of each layer of the stack; a layer by itself is a stack of one."""
        return self.stack or (tuple(shard.name for shard in self.shards),)


#: The halves of an expert, by the prefix of their parameters: gate and up, fused; down.
GATE_UP, DOWN = "w13_", "w2_"


@dataclass(frozen=True, kw_only=True)
class ExpertsContext(LayerContext):
    """A layer of routed experts.

    Attributes:
        sizes: of the layer.
        halves: the projections of all local experts, each kind as a stack of linear layers: gate and up fused under
            `w13_`, down under `w2_`, which are the prefixes of their parameters. Of a layer whose halves are of two
            types, a scheme is told its own half.

    """

    layer_type: ClassVar[str] = "moe"
    sizes: ExpertSizes
    halves: Mapping[str, LinearContext] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttentionContext(LayerContext):
    """An attention layer and its cache."""

    layer_type: ClassVar[str] = "attention"
    sizes: AttentionSizes
