"""Which rows belong to which expert (docs/operators.md, section 6)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: How a group list says how many rows each expert has.
CUMULATIVE, COUNTS, PAIRS = 0, 1, 2

#: Rows of which float32 values are computed at a time: they stay in the cache.
ROWS = 64

#: An operand of one expert, or None.
OfExpert = Callable[[int], Tensor | None]


class Group(NamedTuple):
    """An expert and its rows, of which there is at least one."""

    expert: int
    rows: slice


def groups_of(
    operator: str, group_list: Tensor | Sequence[int], list_type: int | None, experts: int, rows: int
) -> list[Group]:
    """The experts that have rows.

    Args:
        operator: whose argument this is, for errors.
        group_list: int64; of type 0 where the rows of each expert end [E], of type 1 how many each has [E], of type 2
            pairs of an expert and how many it has [any number, 2].
        list_type: 0, 1 or 2; None is 0.
        experts: E.
        rows: of all experts, and perhaps more.

    Raises:
        ValueError: for a list that is not one of these.

    """
    listed: list[Any] = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
    if list_type == PAIRS:
        counted = [(int(expert), int(count)) for expert, count in listed]
        if any(count and not 0 <= expert < experts for expert, count in counted):
            raise ValueError(f"{operator}: group_list has {counted}, expected experts from 0 to {experts - 1}")
    elif len(listed) == experts and list_type in (None, CUMULATIVE, COUNTS):
        counts = listed if list_type == COUNTS else [stop - start for start, stop in pairwise([0, *listed])]
        counted = list(enumerate(counts))
    else:
        raise ValueError(
            f"{operator}: group_list has {len(listed)} entries for {experts} experts, and group_list_type {list_type}"
        )
    if any(count < 0 for _, count in counted) or sum(count for _, count in counted) > rows:
        raise ValueError(
            f"{operator}: group_list {listed} (group_list_type {list_type or 0}) does not cut {rows} rows into groups"
        )
    return list(_laid_out(counted))


def _laid_out(counted: list[tuple[int, int]]) -> Iterator[Group]:
    start = 0
    for expert, count in counted:
        if count:
            yield Group(expert, slice(start, start + count))
        start += count


def batches_of(groups: Sequence[Group], most: int) -> Iterator[Sequence[Group]]:
    """Groups in runs of at most so many rows, a larger one alone: few rows at a time cost more calls than work."""
    first = 0
    for index, group in enumerate(groups):
        if index > first and group.rows.stop - groups[first].rows.start > most:
            yield groups[first:index]
            first = index
    if groups:
        yield groups[first:]


def end_of(groups: Sequence[Group]) -> int:
    """Where the rows that belong to an expert end."""
    return int(groups[-1].rows.stop) if groups else 0


def of_rows(batch: Sequence[Group], of_expert: OfExpert) -> Tensor | None:
    """What an expert has, float32 [n]; of several experts for each of their rows [r, n]."""
    found = [of_expert(expert) for expert, _ in batch]
    if len(found) == 1:
        return None if found[0] is None else found[0].to(torch.float32)
    rows = [
        one.expand(group.stop - group.start, -1)
        for one, (_, group) in zip(found, batch, strict=True)
        if one is not None
    ]
    return torch.cat(rows).to(torch.float32) if rows else None
