"""One vLLM parameter class for everything that a scheme declares."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.parameter import BasevLLMParameter, PerTensorScaleParameter

from quant_core import LoadError
from quant_core.schemes.params import ParamLayout

_QKV = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


class AscendParameter(BasevLLMParameter):
    """A local, fused parameter that knows how each member is cut, checks what arrives, and records it.

    Attributes:
        stored_layout: sizes, axes and members.
        owner: the layer's name, for messages.
        filled: the members that were loaded. Shared by vLLM's shallow copies of the parameter, which is wanted:
            a reload loads through copies. It never steers copying.
        vocabulary: the checkpoint's rows that this rank holds of a vocabulary layer: first, and end.

    """

    def __new__(cls, layout: ParamLayout, owner: str, weight_loader: Callable[..., None]) -> "AscendParameter":
        """Allocate the local shape."""
        data = torch.empty(layout.shape, dtype=layout.param.dtype)
        parameter: AscendParameter = super().__new__(cls, data=data)
        return parameter

    def __init__(self, layout: ParamLayout, owner: str, weight_loader: Callable[..., None]) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self.stored_layout = layout
        self.owner = owner
        self.filled: set[int] = set()
        self.vocabulary = (0, 0)
        if layout.param.dummy is not None:
            self.dummy_weight_value = layout.param.dummy

    @property
    def output_dim(self) -> int | None:
        """vLLM's name for the axis of output features."""
        return self.stored_layout.param.output_dim

    @property
    def input_dim(self) -> int | None:
        """vLLM's name for the axis of input features."""
        return self.stored_layout.param.input_dim

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """The one member of a column-parallel layer."""
        self._load(0, loaded_weight, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        """The one member of a row-parallel layer, whose output features are not cut."""
        self._load(0, loaded_weight, 0)

    def load_replicated_weight(self, loaded_weight: torch.Tensor, shard_id: int | None) -> None:
        """A member of a layer that every rank holds whole."""
        self._load(shard_id or 0, loaded_weight, 0)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """A member of a merged column-parallel layer."""
        self._load(int(kwargs["shard_id"]), loaded_weight, self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        """A member of an attention projection; `num_heads` ranks share one key/value head."""
        shard_id = kwargs["shard_id"]
        member = _QKV[shard_id] if isinstance(shard_id, str) else int(shard_id)
        self._load(member, loaded_weight, self.tp_rank if member == 0 else self.tp_rank // kwargs.get("num_heads", 1))

    def load_vocabulary_weight(self, loaded_weight: torch.Tensor) -> None:
        """This rank's rows of a vocabulary, padded with what dummy weights get."""
        self._fits(0, loaded_weight)
        axis = self.stored_layout.param.output_dim
        if axis is None:
            self._load(0, loaded_weight, 0)
            return
        (first, end), step, size = self.vocabulary, self.stored_layout.param.output_step, self.shape[axis]
        rows = loaded_weight.narrow(axis, first // step, (end - first) // step)
        filled = rows.shape[axis]
        self.data.narrow(axis, 0, filled).copy_(rows)
        self.data.narrow(axis, filled, size - filled).fill_(self.stored_layout.param.dummy or 0)
        self.filled.add(0)

    def missing(self) -> list[int]:
        """Members that were not loaded."""
        return [i for i in range(len(self.stored_layout.members)) if i not in self.filled]

    def parts(self) -> list[torch.Tensor]:
        """What each member loaded."""
        if self.stored_layout.axis is None:
            return list(self.data)
        parts = [self.stored_layout.member(i) for i in range(len(self.stored_layout.members))]
        return [self.data.narrow(self.stored_layout.axis, part.start, part.stop - part.start) for part in parts]

    def _load(self, member: int, loaded: torch.Tensor, output_part: int) -> None:
        layout, param = self.stored_layout, self.stored_layout.members[member]
        if loaded.dim() == 0 and param.shape:
            loaded = loaded.reshape(1)
        self._fits(member, loaded)
        if layout.axis is None:
            target = self.data[member]
        else:
            target, part = self.data, layout.member(member)
            size = part.stop - part.start
            target = target.narrow(layout.axis, part.start, size)
            if param.output_dim is not None:
                loaded = loaded.narrow(param.output_dim, output_part * size, size)
        if param.input_dim is not None and layout.input_parts > 1:
            size = target.shape[param.input_dim]
            loaded = loaded.narrow(param.input_dim, self.tp_rank * size, size)
        target.copy_(loaded)
        self.filled.add(member)

    def _fits(self, member: int, loaded: torch.Tensor) -> None:
        param = self.stored_layout.members[member]
        if tuple(loaded.shape) != param.shape or not param.takes(loaded.dtype):
            raise LoadError(
                f"{self.owner}: {self.stored_layout.name} of member {member} does not fit",
                found=f"{loaded.dtype} {list(loaded.shape)}",
                expected=f"{param.dtype} {list(param.shape)}",
                todo="load weights of the type and size that the model was started with",
            )


class AscendPerTensorParameter(AscendParameter, PerTensorScaleParameter):
    """The same for what has no output features: vLLM repeats it for each member of a module that was fused on disk."""


def make_parameter(layout: ParamLayout, owner: str, weight_loader: Callable[..., None]) -> AscendParameter:
    """The parameter for a layout."""
    kind = AscendPerTensorParameter if layout.param.output_dim is None else AscendParameter
    return kind(layout, owner, weight_loader)


def load_replicated(param: AscendParameter, loaded_weight: torch.Tensor, shard_id: int | None = None) -> None:
    """Weight loader for replicated layers, whose own would go past the parameter's methods."""
    param.load_replicated_weight(loaded_weight, shard_id)


def load_vocabulary(param: AscendParameter, loaded_weight: torch.Tensor) -> None:
    """Weight loader for vocabulary layers, for the same reason."""
    param.load_vocabulary_weight(loaded_weight)
