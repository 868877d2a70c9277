"""Asking a model's loader where it puts modules whose names nothing else explains.

Some models fuse or rename in the code of `load_weights` and say so nowhere. The code itself is asked: it gets tensors
without content under the names in question, and parameters that take notes instead of loading.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quant_core import StoredForm
from vllm_ascend_quant.placement.paths import in_shard_order


@dataclass
class LoaderAnswer:
    """What a loader did with the modules that it was asked about.

    Attributes:
        stored_at: path of a layer to the modules that it is loaded from, in the order of their shards.
        refused: modules for which the loader raised, with its words. It drops the others on purpose.

    """

    stored_at: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def ask_loader(model: nn.Module, layers: Mapping[str, nn.Module], forms: Sequence[StoredForm]) -> LoaderAnswer:
    """Run the model's `load_weights` on the weights of `forms`, noting which of `layers` each is loaded into."""
    notes: dict[str, list[tuple[Any, str]]] = defaultdict(list)
    answer = LoaderAnswer()
    pending = list(forms)
    handed_out: dict[int, tuple[str, torch.Tensor]] = {}
    at = ""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal at
        while pending:
            form = pending.pop(0)
            at = form.module
            weight = torch.empty(form.shape("weight", ()), device="meta")
            handed_out[id(weight)] = at, weight
            yield f"{at}.weight", weight
        at = ""

    def take_note(path: str, weight: torch.Tensor, shard: Any) -> None:
        # Some loaders collect all tensors first; others load a part of the last one, which is a tensor of its own.
        module, _ = handed_out.get(id(weight), (at, weight))
        if (shard, module) not in notes[path]:
            notes[path].append((shard, module))

    load_weights: Any = model.load_weights
    with _noting(layers, take_note):
        while pending:
            try:
                load_weights(weights())
            except Exception as error:  # whatever a model's own code raises for a name that it does not know
                if at:  # after the last one, it misses what it was not given
                    answer.refused[at] = f"{type(error).__name__}: {error}"
    answer.stored_at = {path: in_shard_order(members) for path, members in notes.items()}
    return answer


@contextmanager
def _noting(layers: Mapping[str, nn.Module], take_note: Any) -> Iterator[None]:
    """Put a parameter that takes notes in the place of each layer's weight, for a while."""
    weights = {path: layer._parameters.get("weight") for path, layer in layers.items()}
    real = {path: weight for path, weight in weights.items() if weight is not None}
    for path, weight in real.items():
        noting: Any = nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)

        def load(_: Any, weight: torch.Tensor, shard: Any = None, *, path: str = path, **__: Any) -> None:
            take_note(path, weight, shard)

        noting.weight_loader = load
        layers[path].register_parameter("weight", noting)
    try:
        yield
    finally:
        for path, weight in real.items():
            layers[path].register_parameter("weight", weight)
