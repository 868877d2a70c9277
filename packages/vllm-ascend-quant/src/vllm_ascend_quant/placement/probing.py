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
    takers = {path: (layer, "weight") for path, layer in layers.items()}
    notes, refused = _ask(model, takers, forms)
    return LoaderAnswer({path: in_shard_order(members) for path, members in notes.items()}, refused)


def ask_loader_for_experts(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Sequence[StoredForm]
) -> dict[str, dict[tuple[int, str], str]]:
    """The same of layers of experts: path to {(expert, vLLM's shard): checkpoint module}."""
    takers = {f"{path}.{name}": (layer, name) for path, layer in layers.items() for name in ("w13_weight", "w2_weight")}
    found: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for taker, members in _ask(model, takers, forms)[0].items():
        found[taker.rpartition(".")[0]] |= dict(members)
    return found


#: What was loaded into a parameter: which part of it, and from which module.
Notes = dict[str, list[tuple[Any, str]]]


def _ask(
    model: nn.Module, takers: Mapping[str, tuple[nn.Module, str]], forms: Sequence[StoredForm]
) -> tuple[Notes, dict[str, str]]:
    notes: Notes = defaultdict(list)
    refused: dict[str, str] = {}
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

    def take_note(taker: str, weight: torch.Tensor, part: Any) -> None:
        # Some loaders collect all tensors first; others load a part of the last one, which is a tensor of its own.
        module, _ = handed_out.get(id(weight), (at, weight))
        if (part, module) not in notes[taker]:
            notes[taker].append((part, module))

    load_weights: Any = model.load_weights
    with _noting(takers, take_note):
        while pending:
            try:
                load_weights(weights())
            except Exception as error:  # whatever a model's own code raises for a name that it does not know
                if at:  # after the last one, it misses what it was not given
                    refused[at] = f"{type(error).__name__}: {error}"
    return notes, refused


@contextmanager
def _noting(takers: Mapping[str, tuple[nn.Module, str]], take_note: Any) -> Iterator[None]:
    """Put a parameter that takes notes in the place of each taker, for a while."""
    held = {taker: layer._parameters.get(name) for taker, (layer, name) in takers.items()}
    real = {taker: parameter for taker, parameter in held.items() if parameter is not None}
    for taker, parameter in real.items():
        layer, name = takers[taker]
        noting: Any = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)

        def load(
            param: Any, loaded_weight: torch.Tensor, shard: Any = None, *, taker: str = taker, **more: Any
        ) -> bool:
            # Of experts, the third argument is a name, and two more tell the part.
            part = (more["expert_id"], more["shard_id"]) if "expert_id" in more else shard
            take_note(taker, loaded_weight, part)
            return True

        noting.weight_loader = load
        layer.register_parameter(name, noting)
    try:
        yield
    finally:
        for taker, parameter in real.items():
            layer, name = takers[taker]
            layer.register_parameter(name, parameter)
