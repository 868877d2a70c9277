"""Quantised key/value caches, by `kv_cache_scheme` and the scales that belong to it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quant_compressed_tensors.section import CONFIG, Section
from quant_core import (
    CheckpointFolder,
    Evidence,
    LayerQuant,
    LayerResolutionError,
    StoredForm,
    StoredTensor,
    UnsupportedSchemeError,
    WeightForm,
)
from quant_core.errors import listing

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

#: The scheme for each kind of cache.
_TYPES = {("int", 8): "C8", ("float", 8): "KV_FP8"}
#: What shares a scale, in the words of a stored form.
_STRATEGIES = {"tensor": "tensor", "attn_head": "head", "channel": "channel"}
#: The tensors by their names below an attention module, and by canonical suffix. Old writers put them elsewhere.
_NAMES = {
    "k_scale": "k_scale",
    "k_zero_point": "k_offset",
    "v_scale": "v_scale",
    "v_zero_point": "v_offset",
    "k_proj.k_scale": "k_scale",
    "v_proj.v_scale": "v_scale",
    "k_proj.output_scale": "k_scale",
    "k_proj.output_zero_point": "k_offset",
    "v_proj.output_scale": "v_scale",
    "v_proj.output_zero_point": "v_offset",
}
_PROJECTIONS = frozenset(name.partition(".")[0] for name in _NAMES if "." in name)

#: How tensors are called that belong to a cache and not to the module that their name says.
OWNED_BY_CACHES = frozenset(name.rpartition(".")[2] for name in _NAMES)


def quantised_caches(section: Section, folder: CheckpointFolder) -> Mapping[str, LayerQuant]:
    """The caches by attention module; see QuantFormat.caches.

    Raises:
        UnsupportedSchemeError: if no scheme keeps what is asked for.
        LayerResolutionError: if scales are absent, or only partly there.

    """
    args = section.cache
    if args is None:
        return {}
    key = section.key("kv_cache_scheme")
    name = cache_type(args, key)
    found: dict[str, dict[str, StoredTensor]] = {}
    projected: dict[str, set[str]] = {}
    for module, form in folder.modules.items():
        above, _, last = module.rpartition(".")
        if last in _PROJECTIONS and form.has("weight") | form.has("weight_packed"):
            projected.setdefault(above, set()).add(last)
        for suffix, tensor in form.tensors.items():
            if last in _PROJECTIONS and (canonical := _NAMES.get(f"{last}.{suffix}")):
                found.setdefault(above, {})[canonical] = tensor
            elif canonical := _NAMES.get(suffix):
                found.setdefault(module, {})[canonical] = tensor
    needed = {"k_scale", "v_scale"} | (set() if args.symmetric else {"k_offset", "v_offset"})
    whole = [module for module, projections in projected.items() if projections == _PROJECTIONS]
    lacking = {module: needed - found.get(module, {}).keys() for module in {*whole, *found}}
    # The names of today's writers come first.
    called = {canonical: name for name, canonical in reversed(_NAMES.items())}
    absent = [f"{module}.{called[suffix]}" for module in sorted(lacking) for suffix in sorted(lacking[module])]
    if absent and folder.modules:
        raise LayerResolutionError(
            f"{CONFIG} says that the key/value cache is quantised, and {len(absent)} of its scales are absent",
            where=f"{CONFIG}: {key}",
            found=f"no {listing(absent)}",
            expected="scales of keys and values of every attention layer",
            todo="take config.json and weights from one run of the tool; finish the download",
        )
    of_type, strategy = _word(args.type), _word(args.strategy)
    weight = WeightForm(type=of_type, strategy=_STRATEGIES[strategy], symmetric=args.symmetric)  # type: ignore[arg-type]
    evidence = (Evidence(CONFIG, key, f"{of_type}{args.num_bits} per {strategy}"),)
    return {
        module: LayerQuant(name, (module,), (StoredForm(module, tensors, weight),), evidence)
        for module, tensors in found.items()
    }


def cache_type(args: "QuantizationArgs", key: str) -> str:
    """The registered name of the scheme for a cache.

    Raises:
        UnsupportedSchemeError: if there is none; names the key.

    """
    of_type, strategy = _word(args.type), _word(args.strategy)
    name = _TYPES.get((of_type, args.num_bits))
    if name is None or args.dynamic is not False or strategy not in _STRATEGIES:
        how = "with scales found at run time" if args.dynamic is not False else f"with scales per {strategy}"
        raise UnsupportedSchemeError(
            f"{CONFIG} asks for what is not served: a key/value cache of {of_type}{args.num_bits} {how}",
            where=f"{CONFIG}: {key}",
            expected="int8 or FP8 with stored scales of the tensor or of heads (strategy tensor or attn_head)",
            todo="quantise the cache like that, or not at all",
            file=CONFIG,
        )
    return name


def _word(value: object) -> str:
    """What the section says; the library makes members of enumerations of what it leaves out."""
    return str(getattr(value, "value", value))
