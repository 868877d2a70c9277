"""Rows of a weight that a model's loader rearranges on the way.

Llama 4's loader permutes the rows of q and k for vLLM's rotary embedding. It goes by the names of tensors, and does not
know most of those that hold a number per row beside a quantised weight: they would belong to other rows then. So each
parameter takes note whether what it is given is still the stream's tensor or something else made from it; in that case
the loader is given the numbers of the rows under the weight's name, and what was left behind follows by them.
"""

from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from quant_core.schemes.filling import Filling

#: The type of tensors of row numbers. No quantised weight has it.
_NUMBERS = torch.float64


@dataclass
class Rows:
    """What a model's loader did with the rows of one parameter.

    Attributes:
        rearranged: members that came as something else than the stream's tensor.
        order: by member, which stored row became which, within what this rank holds; None if that is no permutation.
            Kept for reloads, which go through the same loader.

    """

    rearranged: set[int] = field(default_factory=set)
    order: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def learn(self, filling: Filling, member: int, numbers: torch.Tensor, output_part: int, input_part: int) -> None:
        """Take the order from row numbers that came the way of the weight."""
        layout, axis = filling.layout, filling.layout.members[member].output_dim
        assert axis is not None
        here = layout.cut(numbers, member, output_part, input_part).movedim(axis, 0).flatten(1)[:, 0].long()
        there = layout.cut(_numbers(layout.members[member].shape, axis), member, output_part, input_part)
        first = int(there.min())
        if len(set(filling.modules[0])) < len(filling.modules[0]):  # fused on disk: numbered over all members
            first += sum(part.shape[axis] for part in layout.members[:member])
        expected = torch.arange(first, first + len(here))
        self.order[member] = here - first if torch.equal(here.sort().values, expected) else None


class HandedOut:
    """The memory of the stream's tensors that is still alive, and whether the last one was found rearranged.

    Memory and not tensors: a loader may keep a view of a part only, until vLLM's reload uses it.
    """

    def __init__(self) -> None:
        self._by_address: dict[int, list[StorageWeakRef]] = {}
        self._asked_axis: int | None = None

    def note(self, tensor: torch.Tensor) -> None:
        """Remember a tensor that a loader is given."""
        storage = tensor.untyped_storage()
        self._by_address.setdefault(storage.data_ptr(), []).append(StorageWeakRef(storage))

    def forget(self) -> None:
        """The stream has ended."""
        self._by_address.clear()
        self._asked_axis = None

    def came_as_it_was(self, tensor: torch.Tensor) -> bool:
        """Whether this is a stream's tensor or a view of one, or comes from no stream."""
        if not self._by_address:
            return True
        address = tensor.untyped_storage().data_ptr()
        return any(not reference.expired() for reference in self._by_address.get(address, ()))

    def ask(self, axis: int) -> None:
        """Have the stream send row numbers under the name of the last tensor, whose rows lie on this axis."""
        self._asked_axis = axis

    def question(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Numbers of a tensor's rows, in its shape, if the loader is to be asked about it."""
        axis, self._asked_axis = self._asked_axis, None
        return None if axis is None else _numbers(tuple(tensor.shape), axis)


#: One model is loaded at a time in a process.
handed_out = HandedOut()


def is_question(tensor: torch.Tensor) -> bool:
    """Whether these are row numbers and no weights."""
    return tensor.dtype == _NUMBERS


def _numbers(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    numbers = torch.arange(shape[axis], dtype=_NUMBERS)
    return numbers.view([-1 if other == axis else 1 for other in range(len(shape))]).expand(shape)
