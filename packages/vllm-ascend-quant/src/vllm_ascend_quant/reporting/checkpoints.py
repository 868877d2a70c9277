"""The part of a report about a model: its format, and what is decided about its modules, without an engine."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ascend_quant.reporting.child import explained
from vllm_ascend_quant.switches import enabled

if TYPE_CHECKING:
    from quant_core import CheckpointFolder, QuantFormat

#: What of config.json says which model it is.
_CONFIG = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "num_hidden_layers")

#: So many different errors about modules are told.
_ERRORS = 5


def model(name: str) -> dict[str, Any]:
    """A folder, or a model in the Hugging Face cache; nothing is downloaded.

    Raises:
        CheckpointError: if this machine has no such folder.

    """
    from quant_core import CheckpointError, CheckpointFolder, list_formats

    folder = CheckpointFolder.locate(name)
    if folder is None:
        raise CheckpointError(f"{name} is neither a folder nor a model in the Hugging Face cache of this machine")
    opened = {format_name: _opened(cls, folder) for format_name, cls in list_formats().items()}
    return {
        "folder": str(folder.path),
        "config.json": _tried(_config, folder),
        "files": _tried(folder.files, "*"),
        "weights": _tried(_weights, folder),
        "formats": {format_name: answer for format_name, answer in opened.items() if answer}
        or "no installed format recognises it",
    }


def _tried(ask: Callable[..., Any], *arguments: object) -> Any:
    """An answer, or the error in its place: what is wrong with one file must not hide the others."""
    try:
        return ask(*arguments)
    except Exception as error:
        return {"ERROR": explained(error)}


def _config(folder: "CheckpointFolder") -> dict[str, Any]:
    found = {key: folder.config[key] for key in _CONFIG if key in folder.config}
    return found | {"quantisation method": folder.declared_method or "(none)"}


def _weights(folder: "CheckpointFolder") -> dict[str, Any]:
    files, tensors = [folder.path / name for name in folder.weight_files], folder.tensors
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": len(tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
    }


def _opened(format_class: type["QuantFormat"], folder: "CheckpointFolder") -> dict[str, Any]:
    """What a format says of a folder, decisions or all that is wrong; nothing if it does not recognise it."""
    try:
        detection = format_class.detect(folder)
        if detection is None:
            return {}
    except Exception as error:
        return {"ERROR": f"it cannot tell whether this is its format: {explained(error)}"}
    found = {"recognised because": detection.reason, "served here": enabled(format_class.name)}
    try:
        opened = format_class.load(folder)
    except Exception as error:
        return {**found, "ERROR": explained(error)}
    odd = _tried(lambda: [str(finding) for finding in format_class.findings(folder)])
    return {**found, "modules": _tried(_decisions, opened), "caches": _tried(_caches, opened), "odd": odd}


def _decisions(opened: "QuantFormat") -> dict[str, Any]:
    """Each type with the number of modules that are of it, and the first of them with what decided."""
    from quant_core import LayerQuery

    kinds: dict[str, dict[str, Any]] = {}
    errors: dict[str, list[str]] = {}
    for module, form in opened.modules.items():
        if not form.has("weight"):
            continue
        try:
            quant = opened.layer_quant(LayerQuery(module, modules=(module,)))
        except Exception as error:
            errors.setdefault(type(error).__name__, []).append(explained(error))
            continue
        kind = kinds.setdefault(quant.quant_type or "FLOAT", {"count": 0, "such as": module})
        kind["count"] += 1
        kind.setdefault("because", str(quant.evidence[0]) if quant.evidence else quant.reason)
    failed = {name: {"count": len(told), "first": told[:_ERRORS]} for name, told in errors.items()}
    return dict(sorted(kinds.items())) | ({"ERROR": failed} if failed else {})


def _caches(opened: "QuantFormat") -> dict[str, int]:
    """Each type of quantised key/value cache with the number of its layers."""
    types = sorted(str(quant.quant_type) for quant in opened.caches.values())
    return {kind: len(list(same)) for kind, same in itertools.groupby(types)}
