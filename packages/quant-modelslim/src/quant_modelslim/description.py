"""`quant_model_description*.json`: one flat object of global keys and one type per tensor.

Writers and their dialects: docs/formats/modelslim.md, sections 1 to 3.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quant_core import CheckpointError, CheckpointFolder
from quant_core.errors import listing

#: The format's name.
NAME = "modelslim"

PATTERN = "quant_model_description*.json"

#: What every writer calls its weights.
WEIGHTS = "quant_model_weight*.safetensors"

#: The last component of a key that says how an attention module computes; no tensor belongs to it.
ATTENTION_TYPE = "quant_type"
_ATTENTION_SUFFIX = f".{ATTENTION_TYPE}"


class _Keys(BaseModel):
    """Known keys are checked; unknown ones are tolerated, and so is null for any of them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class RotatedLayers(_Keys):
    """The modules whose input is rotated at run time."""

    layers: tuple[str, ...] | None = Field(default=None, strict=False)


class QuaRot(_Keys):
    """What the rotation of a model left to be done at run time, and the files that belong to it."""

    heads_rotation: RotatedLayers | None = None
    kronecker_rotation: RotatedLayers | None = None
    rotation_map: dict[str, str] | None = None


class Extension(_Keys):
    """The objects `metadata` and `optional`."""

    quarot: QuaRot | None = None


class GlobalKeys(_Keys):
    """The keys that describe the whole model."""

    model_quant_type: str | None = None
    version: str | None = None
    group_size: int | None = Field(default=None, ge=0, le=2**20)
    metadata: Extension | None = None
    optional: Extension | None = None
    kv_cache_type: str | None = None
    kv_quant_type: str | None = None
    fa_quant_type: str | None = None
    indexer_quant_type: str | None = None
    reduce_quant_type: str | None = None
    is_rot_used: bool | None = None
    max_supported_tp: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Description:
    """A description file, split and checked.

    Attributes:
        file: its name.
        types: tensor name to type, without nulls.
        attention_types: attention module to the type of its computation.
        keys: the global keys.

    """

    file: str
    types: Mapping[str, str]
    attention_types: Mapping[str, str] = field(default_factory=dict)
    keys: GlobalKeys = field(default_factory=GlobalKeys)

    @classmethod
    def read(cls, folder: CheckpointFolder) -> Self:
        """The folder's one description. Copies of it under other names, as other servers want it, are the same one.

        Raises:
            CheckpointError: if there is none, if two contradict each other, or it is not what a description must be.

        """
        files = folder.files(PATTERN)
        if not files:
            raise _no_description(folder)
        content = folder.read_json(files[0])
        for other in files[1:]:
            if (copied := folder.read_json(other)) != content:
                raise _contradiction(folder, files[0], content, other, copied)
        return cls.parse(content, files[0])

    @classmethod
    def parse(cls, content: object, file: str) -> Self:
        """Split the object that the file holds.

        Raises:
            CheckpointError: lists what is wrong.

        """
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, expected an object of tensor names")
        attention: dict[str, str] = {}
        general: dict[str, Any] = {}
        wrong: list[str] = []
        prefix = _common_prefix(content)
        # Nearly all entries are plain, and large models have very many: only the others are looked at closely.
        types: dict[str, str] = dict(content)
        for key, value in content.items():
            if "." in key and isinstance(value, str) and value and _ATTENTION_SUFFIX not in key and not prefix:
                continue
            name = key.removeprefix(prefix)
            if "." in name and isinstance(value, str) and value and not key.endswith(_ATTENTION_SUFFIX):
                continue
            del types[key]
            if "." not in name:
                general[name] = value
            elif isinstance(value, str) and value:
                attention[key.removesuffix(_ATTENTION_SUFFIX)] = value
            elif value is not None:
                wrong.append(f"{key}: {value!r}")
        if wrong:
            raise CheckpointError(
                f"{file} gives {len(wrong)} tensors something else than a type: {listing(wrong)}",
                expected='a name such as "W8A8_DYNAMIC" or "FLOAT"',
            )
        if not types:
            raise CheckpointError(
                f"{file} describes no tensor",
                found=f"the keys {listing(content)}" if content else "an empty object",
                expected='entries such as "model.layers.0.mlp.up_proj.weight": "W8A8"',
                todo="the tool did not finish: quantise the model again",
            )
        return cls(file, types, attention, _global_keys(general, file))


def _contradiction(folder: CheckpointFolder, file: str, content: Any, other: str, copied: Any) -> CheckpointError:
    """The error for two descriptions of one folder that are not equal."""
    found = "a file that holds no JSON object"
    if isinstance(content, dict) and isinstance(copied, dict):
        entries = [{(key, json.dumps(value)) for key, value in one.items()} for one in (content, copied)]
        differing = sorted({key for key, _ in entries[0] ^ entries[1]})
        found = f"{len(differing)} keys with other values: {listing(differing)}"
    return CheckpointError(
        f"{folder.path} has two ModelSlim descriptions that contradict each other: {file} and {other}",
        found=found,
        expected="one, or copies of it",
        todo="move the one that does not belong to the weights out of the folder",
    )


def _no_description(folder: CheckpointFolder) -> CheckpointError:
    weights, method = folder.files(WEIGHTS), folder.declared_method
    if weights:
        return CheckpointError(
            f"{folder.path} has {listing(weights)}, but no {PATTERN}",
            todo="copy the description that msModelSlim wrote beside the weights: without it the types are unknown",
        )
    return CheckpointError(
        f"{folder.path} is no ModelSlim checkpoint: it has no {PATTERN}",
        found=f"config.json declares the method {method!r}" if method else listing(folder.files("*")) or None,
        todo=f"serve it with --quantization {method}" if method else "serve a float model without --quantization",
    )


def _common_prefix(keys: Collection[str]) -> str:
    """The component that precedes every key, the global ones too, as one adapter writes them; usually empty."""
    prefix = next(iter(keys), "").partition(".")[0] + "."
    if not any(f"{prefix}{name}" in keys for name in GlobalKeys.model_fields):  # seldom, and quickly told
        return ""
    return prefix if all(f"{key}.".startswith(prefix) for key in keys) else ""


def _global_keys(values: dict[str, Any], file: str) -> GlobalKeys:
    try:
        keys = GlobalKeys.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise CheckpointError(f"{file} has global keys with unusable values: {listing(problems)}") from error
    if keys.version is not None:
        try:
            major = Version(keys.version).major
        except InvalidVersion:
            major = -1
        if major != 1:
            raise CheckpointError(
                f"{file} is of version {keys.version!r}",
                expected="1.x, or none as the older writers leave it out",
                todo="update quant-modelslim, or report the version",
            )
    return keys
