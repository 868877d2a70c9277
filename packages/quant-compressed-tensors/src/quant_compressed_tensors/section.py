"""The section of config.json that describes a compressed-tensors checkpoint.

It is parsed by the library's own models. What stands here is where the section is, and what its dialects spell
otherwise.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from packaging.version import InvalidVersion, Version

from quant_core import CheckpointError, CheckpointFolder
from quant_core.errors import listing

# The library imports transformers, which takes seconds: only when a folder is in this format.
if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

#: The format's name, and what `quant_method` says.
NAME = "compressed-tensors"

CONFIG = "config.json"
_DEEPEST = 50

#: Keys of the section and of a group that are acted on, or that say nothing about how a model is computed.
KEYS = (
    "config_groups",
    "ignore",
    "format",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
    "quant_method",
    "quantization_status",
    "global_compression_ratio",
    "version",
    "run_compressed",
)
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGUMENTS = ("weights", "input_activations", "output_activations")

#: How writers for Ascend spell null, true and false.
_SPELLED: dict[str, Any] = {"null": None, "none": None, "true": True, "false": False}

#: How the order of columns during calibration is called; it shows in the tensors, if it matters at all.
_ORDERS = (None, True, False, "weight", "static", "group", "dynamic")


@dataclass(frozen=True)
class Section:
    """The section, parsed.

    Attributes:
        place: its key in config.json.
        groups: the schemes by the name of their group, in the order of the file.
        ignore: names and patterns of modules that stay float.
        format: how all groups are stored that do not say it themselves.
        cache: how keys and values are kept in a cache; None for a float one.
        raw: what config.json has.

    """

    place: str
    groups: Mapping[str, "QuantizationScheme"]
    ignore: tuple[str, ...]
    format: str
    cache: "QuantizationArgs | None"
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, folder: CheckpointFolder) -> Self:
        """Find and parse the section of a folder.

        Raises:
            CheckpointError: if there is none, or the library cannot parse it; names the key.

        """
        found = find_section(folder)
        if found is None:
            raise CheckpointError(
                f"{folder.path} is no compressed-tensors checkpoint: config.json has no section that says so",
                found=f"the method {folder.declared_method!r}" if folder.declared_method else None,
                expected=f'"quantization_config": {{"quant_method": "{NAME}", ...}}',
                todo="serve it without --quantization, or take the config.json that was written with the weights",
            )
        place, raw = found
        _check_depth(raw, place)
        plain = _without_dialect(raw)
        config = _parsed(plain, place, raw)
        groups = {name: scheme for name, scheme in config.config_groups.items() if not isinstance(scheme, list)}
        return cls(place, groups, tuple(config.ignore or ()), str(config.format), config.kv_cache_scheme, raw)

    @property
    def target_scheme_map(self) -> dict[str, dict[str, Any]]:
        """Each target with the arguments of its group; of several groups with one target, the last counts."""
        return {
            target: {
                "weights": scheme.weights,
                "input_activations": scheme.input_activations,
                "format": scheme.format or self.format,
            }
            for scheme in self.groups.values()
            for target in scheme.targets
        }

    def key(self, *path: str) -> str:
        """A key of the section as a user finds it in config.json."""
        return ".".join([self.place, *path])


def find_section(folder: CheckpointFolder) -> tuple[str, Mapping[str, Any]] | None:
    """The section that names this format, and its key in config.json; None if there is none.

    Old files have it as `compression_config`, some models of text and images inside `text_config`. A section that does
    not name the method may be anything.
    """
    text = folder.config.get("text_config")
    for name in ("quantization_config", "compression_config"):
        for prefix, config in (("", folder.config), ("text_config.", text)):
            section = config.get(name) if isinstance(config, Mapping) else None
            if isinstance(section, Mapping) and _plain(section.get("quant_method")) == NAME:
                return f"{prefix}{name}", section
    return None


def _plain(method: object) -> str:
    """The name of a method as vLLM reads it."""
    return str(method).lower().replace("_", "-")


def _check_depth(raw: Mapping[str, Any], place: str) -> None:
    """Refuse what would exhaust the stack of whoever walks over it; real sections have seven levels."""
    level: list[Any] = [raw]
    for _ in range(_DEEPEST):
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(part, Mapping | list)
        ]
    if level:
        raise CheckpointError(
            f"{CONFIG} has a section that is nested deeper than {_DEEPEST} levels",
            where=f"{CONFIG}: {place}",
            todo="take the config.json that was written with the weights",
            file=CONFIG,
        )


def _without_dialect(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The section as the library wants it.

    The order of columns during calibration is left out: newer versions refuse one that older ones wrote, and what it
    changed shows in the tensors.
    """
    plain = {key: _spelled(value) for key, value in raw.items() if key in KEYS}
    cache = plain["kv_cache_scheme"] = plain.get("kv_cache_scheme") or None
    if isinstance(cache, dict) and _known_order(cache.get("actorder")):
        cache.pop("actorder", None)
    groups = plain.get("config_groups")
    if isinstance(groups, dict):
        for group in groups.values():
            if not isinstance(group, dict):
                continue
            for key in [key for key in group if key not in GROUP_KEYS]:
                del group[key]
            for name in _ARGUMENTS:
                arguments = group.get(name)
                if isinstance(arguments, dict) and _known_order(arguments.get("actorder")):
                    arguments.pop("actorder", None)
    return plain


def _known_order(value: Any) -> bool:
    return any(value is order or (isinstance(order, str) and value == order) for order in _ORDERS)


def _spelled(value: Any) -> Any:
    """A copy with null, true and false where they stand as strings."""
    if isinstance(value, Mapping):
        return {key: _spelled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_spelled(part) for part in value]
    return _SPELLED.get(value.lower(), value) if isinstance(value, str) else value


def _parsed(plain: dict[str, Any], place: str, raw: Mapping[str, Any]) -> Any:
    """What the library makes of a section.

    Raises:
        CheckpointError: says what the library says, and at which key.

    """
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    if not isinstance(plain.get("config_groups"), dict):
        raise _unparsable([f"{place}.config_groups: expected an object of groups"], raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about observers, which only calibration has
            return QuantizationConfig.model_validate(plain)
    except ValidationError as error:
        raise _unparsable(_complaints(error, plain, place), raw) from error
    except Exception as error:  # older libraries raise whatever comes for what they do not know
        raise _unparsable([_complaint(plain, place, error)], raw) from error


def _complaints(error: Any, plain: Mapping[str, Any], place: str) -> list[str]:
    """Each complaint with its key; a group is an object or a list, and the library complains about both."""
    complaints = []
    for problem in error.errors():
        path = problem["loc"]
        if "list[str]" not in path:
            given = "" if isinstance(problem["input"], Mapping) else f", not {str(problem['input'])[:100]!r}"
            keys = _keys(path, plain, absent=problem["type"] == "missing")
            complaints.append(f"{'.'.join([place, *keys])}: {problem['msg'][:500]}{given}")
    return complaints or [f"{place}: {str(error)[:500]}"]


def _keys(path: Iterable[Any], value: Any, absent: bool) -> list[str]:
    """The keys of a path that the library mixes with names of what it tried at them."""
    keys: list[str] = []
    for part in path:
        inside = isinstance(value, Mapping) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            keys.append(str(part))
            value = value[part]
    return [*keys, str(list(path)[-1])] if absent else keys


def _complaint(plain: dict[str, Any], place: str, error: Exception) -> str:
    """An exception without a key, with the key at which it is raised again."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    parts: dict[str, tuple[Any, Any]] = {
        f"{place}.kv_cache_scheme": (QuantizationArgs, plain.get("kv_cache_scheme") or {})
    }
    for name, group in plain["config_groups"].items():
        key = f"{place}.config_groups.{name}"
        for part in _ARGUMENTS if isinstance(group, dict) else ():
            parts[f"{key}.{part}"] = QuantizationArgs, group.get(part) or {}
        parts[key] = QuantizationConfig, {"config_groups": {name: group}}
    for key, (model, part) in parts.items():
        try:
            model.model_validate(part)
        except Exception as again:
            if type(again) is type(error):
                return f"{key}: {error!r}"
    return f"{place}: {error!r}"


def _unparsable(complaints: list[str], raw: Mapping[str, Any]) -> CheckpointError:
    from compressed_tensors import __version__ as installed

    todo = "correct config.json, or quantise the model again"
    try:
        newer = Version(str(raw.get("version"))) > Version(installed)
    except InvalidVersion:
        newer = False
    if newer:
        todo = f"install compressed-tensors {raw['version']} or newer, which wrote it; here is {installed}"
    return CheckpointError(
        f"{CONFIG} has a section that compressed-tensors {installed} cannot read: {listing(complaints)}",
        where=CONFIG,
        todo=todo,
        file=CONFIG,
    )
