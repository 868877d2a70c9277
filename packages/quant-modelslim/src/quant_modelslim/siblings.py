"""Experts, compared with each other: what differs in one of them is wrong in that one.

Without the model nobody knows how many experts a layer should have; but each has as many as the other layers,
and all of one layer have the same projections, of one type.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from quant_core import CheckpointError, Finding, LayerResolutionError
from quant_core.errors import listing
from quant_modelslim.description import Description
from quant_modelslim.type_names import FLOAT, FLOAT_TYPES

#: What the tool calls the module that has the experts of a layer as numbered children.
_EXPERTS = "experts"

#: The number of an expert and the name of one of its projections, to the type.
Children = dict[tuple[int, str], str]


def examine_siblings(description: Description) -> Iterator[Finding]:
    """What is wrong with experts of which any is quantised, by the description, with which tensors are compared too."""
    families = {above: children for above, children in _families(description) if set(children.values()) != {FLOAT}}
    for above, children in families.items():
        yield from _disagreeing(above, children, description)
        yield from _absent(above, children, description)
    yield from _unlike_other_layers(families, description)


def _families(description: Description) -> Iterator[tuple[str, Children]]:
    """The experts of each layer."""
    found: dict[str, Children] = defaultdict(dict)
    for key, quant_type in description.types.items():
        if not key.endswith(".weight"):
            continue
        module = key.removesuffix(".weight")
        above, _, last = module.rpartition(".")
        above, _, number = above.rpartition(".")
        if above.rpartition(".")[2] == _EXPERTS and number.isdecimal():
            found[above][int(number), last] = FLOAT if quant_type in FLOAT_TYPES else quant_type
    yield from found.items()


def _disagreeing(above: str, children: Children, description: Description) -> Iterator[Finding]:
    for last in dict.fromkeys(last for _, last in children):
        types = {number: quant_type for (number, name), quant_type in children.items() if name == last}
        usual, count = Counter(types.values()).most_common(1)[0]
        others = [f"{above}.{n}.{last} is {t}" for n, t in sorted(types.items()) if t != usual]
        if others:
            yield Finding(
                f"{above}: experts have different types",
                where=description.file,
                found=f"{listing(others)}; the other {count} are {usual}",
                expected="one type for all experts of a layer, since they are multiplied at once",
                todo="quantise the experts of a layer alike, or leave all of them FLOAT",
                tensor=f"{above}.{next(n for n, t in types.items() if t != usual)}.{last}.weight",
                error=LayerResolutionError,
            )


def _absent(above: str, children: Children, description: Description) -> Iterator[Finding]:
    numbers = range(1 + max(number for number, _ in children))
    names = dict.fromkeys(last for _, last in children)
    absent = [f"{above}.{number}.{last}" for number in numbers for last in names if (number, last) not in children]
    if absent:
        yield Finding(
            f"{above}: {len(absent)} projections of experts are absent",
            where=description.file,
            found=f"nothing of {listing(absent)}, which {len(children)} others have",
            todo="finish the download; otherwise quantise the model again",
            tensor=f"{absent[0]}.weight",
            error=CheckpointError,
        )


def _unlike_other_layers(families: Mapping[str, Children], description: Description) -> Iterator[Finding]:
    """Layers with another number of experts than most."""
    alike: dict[str, dict[str, int]] = defaultdict(dict)
    for above, children in families.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in above.split("."))
        alike[pattern][above] = 1 + max(number for number, _ in children)
    for counts in alike.values():
        usual, layers = Counter(counts.values()).most_common(1)[0]
        others = {above: count for above, count in counts.items() if count != usual}
        if others and layers > len(others):
            yield Finding(
                f"{len(others)} layers have another number of experts than the other {layers}",
                where=description.file,
                found=listing(f"{above} has {count}" for above, count in others.items()),
                expected=f"{usual}",
                todo="check that description and weights belong together; otherwise quantise the model again",
                error=CheckpointError,
            )
