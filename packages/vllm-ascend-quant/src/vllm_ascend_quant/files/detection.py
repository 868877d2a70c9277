"""Choosing the quantisation method from the files of a model, before vLLM builds its configuration."""

from typing import Any

from quant_core import CheckpointError, CheckpointFolder, Detection, QuantFormat, detect_formats
from vllm_ascend_quant import installed
from vllm_ascend_quant.files import hub


def choose_method(engine_args: Any) -> None:
    """Set `quantization` of the engine arguments if a format recognises the model; contradict a wrong value.

    Raises:
        CheckpointError: if another method was asked for than the model's, by argument or by config.json, or a method
            of ours for a model that is not in its format.

    """
    folder = hub.look_up(_named(engine_args, engine_args.model, engine_args.revision))
    if folder is not None:
        engine_args.quantization = _method(folder, engine_args.quantization, "--quantization {}")


def choose_draft_method(engine_args: Any) -> None:
    """The same for the model of a speculative draft, if it is named; raises as `choose_method`."""
    settings: dict[str, Any] = engine_args.speculative_config or {}
    model = settings.get("model") or engine_args.spec_model
    if model is None:
        return
    revision, asked = settings.get("revision"), settings.get("quantization")
    # Offline, vLLM replaces the name of a target by its folder, and leaves that of a draft.
    folder = hub.look_up(_named(engine_args, model, revision)) or CheckpointFolder.locate(model, revision=revision)
    method = None if folder is None else _method(folder, asked, '"quantization": "{}" in the speculative config')
    if method != asked and method is not None:
        engine_args.speculative_config = {**settings, "quantization": method}


def _named(engine_args: Any, model: Any, revision: str | None) -> hub.NamedModel:
    return hub.NamedModel(str(model), revision, engine_args.hf_token, engine_args.download_dir)


def _method(folder: CheckpointFolder, asked: str | None, as_given: str) -> str | None:
    """vLLM's name of the method of a folder; what was asked for, given in these words, if it is no format of ours."""
    formats = installed.formats()
    found = [detection for detection in detect_formats(folder) if detection.format in formats]
    if not found:
        for quant_format in formats.values():
            if quant_format.vllm_name == asked:
                _load(quant_format, folder, as_given.format(asked))
        return asked
    if len(found) > 1:
        raise CheckpointError(
            f"{folder.path} is recognised as {len(found)} formats",
            found="; ".join(detection.reason for detection in found),
            todo="leave the description of one format: move or remove those of the others, also from config.json",
        )
    method = formats[found[0].format].vllm_name
    if asked not in (None, method):
        instead = as_given.format(method)
        raise _contradiction(as_given.format(asked), method, found[0], f"leave it out, or give {instead}")
    declared = folder.declared_method
    if declared is not None and declared.lower().replace("_", "-") != method:  # as vLLM reads it
        todo = "remove quantization_config from config.json if the weights are those of the description"
        raise _contradiction(f"the method {declared!r} in config.json", method, found[0], todo)
    return method


def _load(quant_format: type[QuantFormat], folder: CheckpointFolder, given: str) -> None:
    """Open a folder that no format recognises, for what the format that was asked for says of it."""
    try:
        quant_format.load(folder)
    except CheckpointError as error:
        first = error.findings[0]
        raise CheckpointError(
            f"{given} does not fit the files: {first.what}", where=first.where, found=first.found, todo=first.todo
        ) from error


def _contradiction(claim: str, method: str, detection: Detection, todo: str) -> CheckpointError:
    return CheckpointError(
        f"{claim} contradicts the files: this is a {detection.format} checkpoint, whose method is {method!r}",
        where=detection.reason,
        todo=todo,
    )
