"""What a section asks for and nobody here does: to leave it out would give other numbers without a word."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from quant_compressed_tensors.section import CONFIG, GROUP_KEYS, KEYS, Section
from quant_core import CheckpointError, Finding, UnsupportedSchemeError
from quant_core.errors import listing

#: How weights are stored that a format of the library's is the name of; those of sparse weights are not among them.
_STORED = (
    *("dense", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mixed-precision"),
    *("mxfp8-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "nvfp4-pack-quantized"),
)
#: What the library says where a section does not.
_UNSAID = "fakequant"

#: What transforms that act at run time multiply; those of weights are in the stored weights already.
_MERGED = ("weight_input", "weight_output")

#: What other keys mean, in the words of an error.
_ELSEWHERE = {
    "moe_sparsity_config": "layers with different numbers of experts",
    "activation_use_clip": "activations that are clipped by a stored ratio before they are quantised",
    "weight_block_size": "blocks of weights; this format says it by `strategy: block` and `block_structure`",
    "li_cache_scheme": "a quantised cache of the lightning indexer",
    "comp_cache_scheme": "a quantised cache of compressed keys",
}


def unserved_parts(section: Section) -> Iterator[Finding]:
    """What the section asks for and nobody here does: to leave it out would give other numbers without a word."""
    yield from _unknown_keys(section.raw, KEYS, section.place)
    for name, group in section.raw["config_groups"].items():
        if isinstance(group, Mapping):
            yield from _unknown_keys(group, (*GROUP_KEYS, "actorder"), section.key("config_groups", name))
    yield from _unread_formats(section)
    yield from _sparse(section)
    yield from _online_transforms(section)
    for name, scheme in section.groups.items():
        key = section.key("config_groups", name)
        if scheme.output_activations is not None:
            todo = "quantise without output_activations"
            yield _unserved(f"{key}.output_activations", "quantised outputs of layers, which no operator has", todo)
        if scheme.weights is None and scheme.input_activations is not None:
            what = f"activations alone, of {listing(scheme.targets)}"
            yield _unserved(f"{key}.input_activations", what, "quantise without attention groups")


def _unserved(key: str, what: str, todo: str, found: object = None) -> Finding:
    return Finding(
        f"{CONFIG} asks for what is not served: {what}",
        where=f"{CONFIG}: {key}",
        found=None if found is None else str(found),
        todo=todo,
        file=CONFIG,
        error=UnsupportedSchemeError,
    )


def _unknown_keys(given: Mapping[str, Any], known: tuple[str, ...], place: str) -> Iterator[Finding]:
    for key, value in given.items():
        if key in known or asks_nothing(value):
            continue
        if key in _ELSEWHERE:
            yield _unserved(f"{place}.{key}", _ELSEWHERE[key], "quantise without it", value)
            continue
        near = difflib.get_close_matches(str(key)[:100], known, n=1)
        yield Finding(
            f"{CONFIG} has a key that nobody reads: {place}.{key}",
            found=str(value)[:200],
            expected=f"{near[0]!r}?" if near else f"one of {listing(known, 20)}",
            todo="correct its name; remove it if it says nothing about how the model is computed",
            file=CONFIG,
            error=CheckpointError,
        )


def asks_nothing(value: Any) -> bool:
    """Whether a value is null, false or empty, in all of its parts."""
    if isinstance(value, str):
        return value.lower() in ("", "null", "none", "false")
    if isinstance(value, Mapping):
        return all(asks_nothing(part) for part in value.values())
    return value is None or value is False or (isinstance(value, list) and all(map(asks_nothing, value)))


def _unread_formats(section: Section) -> Iterator[Finding]:
    given = {section.key("format"): section.format} if section.format != _UNSAID else {}
    for name, scheme in section.groups.items():
        if scheme.format is not None:
            given[section.key("config_groups", name, "format")] = str(scheme.format)
    for key, value in given.items():
        if value not in _STORED:
            todo = f"save the model in one of {listing(_STORED, len(_STORED))}"
            yield _unserved(key, f"weights that are stored as {value[:100]!r}", todo)


def _sparse(section: Section) -> Iterator[Finding]:
    sparsity = section.raw.get("sparsity_config")
    stored = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if stored != "dense" and not asks_nothing(sparsity):
        todo = "save the model without sparse compression (llm-compressor: disable_sparse_compression=True)"
        what = "weights that are stored without their zeros"
        yield _unserved(section.key("sparsity_config"), what, todo, str(sparsity)[:200])


def _online_transforms(section: Section) -> Iterator[Finding]:
    config = section.raw.get("transform_config")
    if asks_nothing(config):
        return
    rest = dict(config) if isinstance(config, Mapping) else {}
    groups = rest.pop("config_groups", None)
    if not isinstance(groups, Mapping) or not asks_nothing(rest):
        todo = "quantise without it"
        yield _unserved(section.key("transform_config"), "transforms that nobody here knows", todo, str(config)[:200])
        return
    for name, scheme in groups.items():
        for location in _locations(scheme):
            if location not in _MERGED:
                where = "a transform that says not where it acts"
                what = f"a transform of {str(location)[:100]} at run time" if location is not None else where
                todo = "quantise with transforms that can be merged into the weights (SpinQuant: R1 and R2 only)"
                yield _unserved(section.key("transform_config", "config_groups", name), what, todo)


def _locations(scheme: Any) -> list[Any]:
    """Where a transform acts; None where it says not."""
    applied = scheme.get("apply") if isinstance(scheme, Mapping) else None
    entries = applied if isinstance(applied, list) else [applied]
    return [entry.get("location") if isinstance(entry, Mapping) else None for entry in entries]
