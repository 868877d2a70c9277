"""Comparing the section with the files, from metadata alone and before an engine exists."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from quant_compressed_tensors.caches import quantised_caches
from quant_compressed_tensors.resolve import EXPERTS, Answer, Resolver, is_expert
from quant_compressed_tensors.section import Section
from quant_compressed_tensors.stating import ATTENTION, OUTPUTS, is_quantised
from quant_compressed_tensors.unserved import asks_nothing, unserved_parts
from quant_core import CheckpointError, CheckpointFolder, Finding, LayerQuant, LoadError, QuantError, StoredForm
from quant_core.errors import listing

#: Classes that every model has.
_EVERYWHERE = ("Linear", "Embedding")


def examine(
    folder: CheckpointFolder, section: Section, resolver: Resolver, modules: Mapping[str, StoredForm]
) -> Iterator[Finding]:
    """Everything that is wrong with a folder without the model.

    Args:
        folder: the folder.
        section: what its config.json says.
        resolver: of this section.
        modules: what the files store, under canonical suffixes.

    """
    yield from unserved_parts(section)
    yield from _stray_cache_scales(section, modules)
    try:
        quantised_caches(section, folder)
    except QuantError as error:
        yield from error.findings
    yield from _shapes_alone(folder, modules)
    wrong: dict[int, tuple[QuantError, list[str]]] = {}
    kinds: dict[object, Answer] = {}
    for form in modules.values():
        if not is_quantised(form):
            continue
        try:
            answer = resolver.of(form)
        except QuantError as error:  # one object for all modules that are alike
            wrong.setdefault(id(error), (error, []))[1].append(form.module)
        else:
            kinds.setdefault((answer.group, form.shape("weight", ())), answer)
    for refusal, alike in wrong.values():
        for finding in refusal.findings:
            yield replace(finding, also=tuple(alike if finding.layer is None else alike[1:]))
    if not wrong:
        yield from _wrong_shapes(folder, kinds.values())


def _shapes_alone(folder: CheckpointFolder, modules: Mapping[str, StoredForm]) -> Iterator[Finding]:
    """Modules that say what shape their weight has, and have none."""
    alone = [form.tensors["weight_shape"] for form in folder.modules.values() if "weight_shape" in form.tensors]
    alone = [tensor for tensor in alone if not modules[tensor.name.rpartition(".")[0]].has("weight")]
    if alone:
        yield Finding(
            f"the files hold weight_shape of {len(alone)} modules, and not their weight_packed",
            where=alone[0].file,
            found=listing(tensor.name for tensor in alone),
            expected="weight_packed, weight_scale and weight_shape",
            todo="finish the download, or quantise the model again",
            tensor=alone[0].name,
            error=LoadError,
        )


def _stray_cache_scales(section: Section, modules: Mapping[str, StoredForm]) -> Iterator[Finding]:
    """Scales of a cache that the section does not mention."""
    schemes = section.groups.values()
    if not asks_nothing(section.raw.get("kv_cache_scheme")) or any(scheme.weights is None for scheme in schemes):
        return
    suffixes = ATTENTION if any(scheme.output_activations for scheme in schemes) else ATTENTION | OUTPUTS
    stray = [t for form in modules.values() for suffix, t in form.tensors.items() if suffix in suffixes]
    if stray:
        yield Finding(
            f"the files hold {len(stray)} scales of a quantised cache, and config.json has no kv_cache_scheme",
            where=f"config.json: {section.place}",
            found=listing(f"{tensor.name} in {tensor.file}" for tensor in stray),
            todo="take config.json and weights from one run of the tool",
            tensor=stray[0].name,
            error=CheckpointError,
        )


def _wrong_shapes(folder: CheckpointFolder, answers: Iterable[Answer]) -> Iterator[Finding]:
    """Packed weights that say another shape of themselves than their words have; one of each kind tells."""
    said = {
        tensor.name: answer
        for answer in answers
        if (tensor := folder.modules[answer.form.module].tensors.get("weight_shape")) is not None
    }
    usual = [name for name in said if folder.tensors[name].shape == (2,)]  # a file may call anything weight_shape
    values = {name: value.tolist() for name, value in folder.read_tensors(usual).items()}
    for name, answer in said.items():
        form = answer.form
        inputs, outputs = form.sizes() or (0, 0)
        shape = values.get(name, f"of the shape {list(folder.tensors[name].shape)}")
        if shape != [outputs, inputs]:
            yield Finding(
                f"{form.module} holds another number of weights than it says",
                where=f"config.json: {answer.evidence.key}",
                found=f"{form.found('weight')}, which is {[outputs, inputs]} of {form.weight and form.weight.num_bits} "
                f"bits; {name} is {shape}",
                expected="the number of bits with which the weights were packed",
                todo="take config.json and weights from one run of the tool",
                tensor=name,
                error=LoadError,
            )


def oddities(
    folder: CheckpointFolder,
    section: Section,
    resolver: Resolver,
    modules: Mapping[str, StoredForm],
    decisions: Mapping[str, LayerQuant],
) -> Iterator[Finding]:
    """Entries that match nothing, and groups whose targets match what is stored in float.

    Args:
        folder: the folder.
        section: what its config.json says.
        resolver: of this section.
        modules: what the files store.
        decisions: about each layer of a model, by the engine's name of it; none without a model.

    """
    entries: dict[str, list[str]] = defaultdict(list)
    for group, scheme in section.groups.items():
        for target in scheme.targets if scheme.weights is not None else ():
            entries[target].append(section.key("config_groups", group, "targets"))
    for entry in section.ignore:
        entries[entry].append(section.key("ignore"))
    tied = bool(folder.config.get("tie_word_embeddings"))
    for entry, keys in entries.items():
        if entry in _EVERYWHERE or (entry == "lm_head" and tied) or _names_something(entry, resolver, modules):
            continue
        yield Finding(
            f"{entry!r} names no module of this checkpoint",
            where=f"config.json: {listing(keys)}",
            todo="none, if it names what this model does not have; otherwise correct it",
            file="config.json",
            severity="warning",
        )
    silent = Counter(
        (evidence.key, evidence.value)
        for quant in decisions.values()
        if quant.quant_type is None
        for evidence in quant.evidence
        if evidence.key in {section.key("config_groups", group) for group in section.groups}
    )
    for (key, target), count in sorted(silent.items()):
        yield Finding(
            f"{count} modules that {target!r} matches are stored in float, and are served in float",
            where=f"config.json: {key}",
            severity="info",
        )


def _names_something(entry: str, resolver: Resolver, modules: Mapping[str, StoredForm]) -> bool:
    if entry == EXPERTS:
        return any(is_expert(module) for module in modules)
    return resolver.matcher.names_one_of(entry, modules)
