"""The order of rows for experts: choices of tokens sorted by expert."""

from typing import NamedTuple

import torch
from torch import Tensor

# So many choices are few.
_FEW = 64


class Order(NamedTuple):
    """Choices (token · K + k) in the order of experts; what chose none of these experts stands behind `active`.

    Attributes:
        choices: all of them.
        active: how many chose an expert that is here.
        counts: how many chose each.
        places: where each choice went, -1 if nowhere.

    """

    choices: Tensor
    active: int
    counts: Tensor
    places: Tensor


def by_expert(expert_idx: Tensor, first: int, count: int | None) -> Order:
    """Choices by expert; `count` experts from `first` on are here, or all."""
    ids = expert_idx.flatten()
    if count is None:
        count = int(ids.max()) + 1 if len(ids) else 0
    if len(ids) <= _FEW:
        return _sorted_list(ids.tolist(), first, count)
    local = ids - first
    local = torch.where((local >= 0) & (local < count), local, count)
    counts, choices = torch.bincount(local, minlength=count + 1), torch.argsort(local, stable=True)
    active = len(ids) - int(counts[count])
    places = torch.full((len(ids),), -1, dtype=torch.int32, device="cpu")
    places[choices[:active]] = torch.arange(active, dtype=torch.int32, device="cpu")
    return Order(choices, active, counts[:count], places)


def _sorted_list(ids: list[int], first: int, count: int) -> Order:
    """The same of a few choices, for which calls of torch cost more than the work."""
    local = [one - first if first <= one < first + count else count for one in ids]
    choices = sorted(range(len(local)), key=local.__getitem__)
    counts, places = [0] * (count + 1), [-1] * len(local)
    for row, choice in enumerate(choices):
        counts[local[choice]] += 1
        if local[choice] < count:
            places[choice] = row
    return Order(
        torch.tensor(choices, dtype=torch.int64, device="cpu"),
        len(local) - counts[count],
        torch.tensor(counts[:count], dtype=torch.int64, device="cpu"),
        torch.tensor(places, dtype=torch.int32, device="cpu"),
    )
