"""One vLLM parameter class for everything that a scheme declares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from vllm.model_executor.parameter import BasevLLMParameter, PackedColumnParameter, PerTensorScaleParameter

from quant_core import LimitError, Param
from quant_core.errors import listing
from quant_core.schemes.filling import Filling
from vllm_ascend_quant.methods.rows import Rows, handed_out, is_question

_QKV = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


_asked: ContextVar[torch.dtype | None] = ContextVar("_asked", default=None)


@contextmanager
def dtype_of_the_model(dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, a stored weight says that its dtype is the model's.

    Models that ask for the dtype of a layer's weight while they are built or loaded make something of their own in it,
    such as the scale of an embedding. What is in memory is asked by `.data.dtype`.
    """
    token = _asked.set(dtype)
    try:
        yield
    finally:
        _asked.reset(token)


class AscendParameter(BasevLLMParameter):
    """A local, fused parameter that is filled as its layout says, and knows from what.

    Attributes:
        filling: layout and record. Shared by vLLM's shallow copies of the parameter, which is wanted: a reload loads
            through copies.
        rows: what the model's loader did with the rows. Shared likewise.
        vocabulary: the checkpoint's rows that this rank holds of a vocabulary layer: first, and end.

    """

    def __new__(cls, filling: Filling, weight_loader: Callable[..., Any]) -> "AscendParameter":
        """Allocate the local shape."""
        data = torch.empty(filling.layout.shape, dtype=filling.layout.param.dtype)
        parameter: AscendParameter = super().__new__(cls, data=data)
        return parameter

    def __init__(self, filling: Filling, weight_loader: Callable[..., Any]) -> None:
        # Not super's: vLLM's other classes, by which its loaders tell parameters apart, want what the layout has.
        BasevLLMParameter.__init__(self, data=self.data, weight_loader=weight_loader)
        self.filling = filling
        self.rows = Rows()
        self.vocabulary = (0, 0)
        if filling.layout.param.dummy is not None:
            self.dummy_weight_value = filling.layout.param.dummy

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The model's dtype to a model that asks while it is built or loaded; see `dtype_of_the_model`.

        Not of a tensor without memory, of which vLLM's reload makes one with memory.
        """
        return super().dtype if self.is_meta else _asked.get() or super().dtype

    @property
    def param(self) -> Param:
        """What the scheme declared, for all members alike."""
        return self.filling.layout.param

    @property
    def output_dim(self) -> int | None:
        """vLLM's name for the axis of output features."""
        return self.param.output_dim

    @property
    def input_dim(self) -> int | None:
        """vLLM's name for the axis of input features."""
        return self.param.input_dim

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
        self.filling.check(loaded_weight)
        axis = self.param.output_dim
        if axis is None:
            self._load(0, loaded_weight, 0)
            return
        (first, end), step, size = self.vocabulary, self.param.output_step, self.shape[axis]
        rows = loaded_weight.narrow(axis, first // step, -(-(end - first) // step))  # the last one may be partial
        filled = rows.shape[axis]
        self.data.narrow(axis, 0, filled).copy_(rows)
        self.data.narrow(axis, filled, size - filled).fill_(self.param.dummy or 0)
        self.filling.filled.add((0, 0))

    def begin_again(self) -> None:
        """Forget what was loaded."""
        self.filling.filled.clear()
        self.rows.rearranged.clear()

    def _load(self, member: int, loaded: torch.Tensor, output_part: int) -> None:
        if is_question(loaded) and member in self.rows.rearranged and self.filling.layout.name == "weight":
            self.rows.learn(self.filling, member, loaded, output_part, self.tp_rank)
            return
        if self.param.output_dim is not None and not handed_out.came_as_it_was(loaded):
            self.rows.rearranged.add(member)
            if self.filling.layout.name == "weight" and member not in self.rows.order:
                handed_out.ask(self.param.output_dim)
        self.filling.load(self.data, loaded, member, output_part=output_part, input_part=self.tp_rank)


class AscendPerTensorParameter(AscendParameter, PerTensorScaleParameter):
    """The same for what has no output features: vLLM repeats it for each member of a module that was fused on disk."""


class AscendPackedParameter(AscendParameter, PackedColumnParameter):
    """The same for several output features in one element: vLLM cuts a module that was fused on disk accordingly."""

    @property
    def packed_dim(self) -> int | None:
        """The axis of output features."""
        return self.param.output_dim

    @property
    def packed_factor(self) -> int:
        """Output features in one element."""
        return self.param.output_step

    @property
    def marlin_tile_size(self) -> None:
        """A layout of GPUs."""
        return None


def make_parameter(filling: Filling, weight_loader: Callable[..., None]) -> AscendParameter:
    """The parameter for a layout that is about to be filled."""
    param = filling.layout.param
    if param.output_dim is None:
        return AscendPerTensorParameter(filling, weight_loader)
    return (AscendPackedParameter if param.output_step > 1 else AscendParameter)(filling, weight_loader)


def align_rows(name: str, parameters: Mapping[str, AscendParameter]) -> None:
    """Let whatever a layer has one entry per row of follow the rows of its weight.

    Args:
        name: the layer's, for messages.
        parameters: what was loaded, by suffix; the order of rows is that of `weight`.

    Raises:
        LimitError: names what cannot follow: several rows in one element, or rows from elsewhere.

    """
    weight = parameters.get("weight")
    if weight is None:
        return
    for member in sorted(weight.rows.rearranged):
        order = weight.rows.order.get(member)
        if order is not None and torch.equal(order, torch.arange(len(order))):
            continue  # copied only
        packed = weight.param.output_step > 1
        behind = {
            suffix: parameter
            for suffix, parameter in parameters.items()
            if parameter.param.output_dim is not None
            and (member not in parameter.rows.rearranged or parameter.param.output_step > 1)
        }
        stuck = [s for s, parameter in behind.items() if packed or order is None or parameter.param.output_step > 1]
        if stuck:
            module = weight.filling.modules[0][member]
            raise LimitError(
                f"{name}: vLLM's loader of this model rearranges the rows of {module}.weight, and "
                f"{listing(f'{module}.{suffix}' for suffix in stuck)} cannot be rearranged likewise",
                todo="leave it float, or use a type with one value to a byte and nothing per row but weight_scale",
            )
        for parameter in behind.values():
            assert order is not None
            assert parameter.param.output_dim is not None
            part = parameter.filling.layout.part(parameter.data, member)
            part.copy_(part.index_select(parameter.param.output_dim, order.to(part.device)))


def load_replicated(param: AscendParameter, loaded_weight: torch.Tensor, shard_id: int | None = None) -> None:
    """Weight loader for replicated layers, whose own would go past the parameter's methods."""
    param.load_replicated_weight(loaded_weight, shard_id)


def load_vocabulary(param: AscendParameter, loaded_weight: torch.Tensor) -> None:
    """Weight loader for vocabulary layers, for the same reason."""
    param.load_vocabulary_weight(loaded_weight)
