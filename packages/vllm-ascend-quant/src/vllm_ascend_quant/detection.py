"""Choosing the quantisation method from the files of a model, before vLLM builds its configuration."""

from typing import Any

from quant_core import CheckpointError, Detection, list_formats
from vllm_ascend_quant import hub


def choose_method(engine_args: Any) -> None:
    """Set `quantization` of the engine arguments if a format recognises the model; contradict a wrong value.

    Raises:
        CheckpointError: if another method was asked for than the model's, by argument or by config.json, or a method
            of ours for a model that is not in its format.

    """
    folder = hub.look_up(engine_args)
    if folder is None:
        return
    formats = list_formats()
    asked = engine_args.quantization
    try:
        found = [d for d in (fmt.detect(folder) for fmt in formats.values()) if d is not None]
    except hub.UnreachableError:
        return
    if not found:
        for quant_format in formats.values():
            if quant_format.vllm_name == asked:
                quant_format.load(folder)  # says what is wrong with the files
        return
    if len(found) > 1:
        raise CheckpointError(
            f"{folder.path} is recognised as {len(found)} formats",
            found="; ".join(detection.reason for detection in found),
            todo="move the files of all but one format out of the folder",
        )
    method = formats[found[0].format].vllm_name
    _contradict(asked, method, found[0], "--quantization", "leave the argument out")
    _contradict(
        folder.declared_method,
        method,
        found[0],
        "config.json",
        "remove quantization_config from config.json if the weights are those of the description",
    )
    engine_args.quantization = method


def _contradict(claimed: str | None, method: str, detection: Detection, source: str, todo: str) -> None:
    if claimed is not None and claimed != method:
        raise CheckpointError(
            f"{source} asks for the method {claimed!r}, but this is a {detection.format} checkpoint ({method!r})",
            where=detection.reason,
            todo=todo,
        )
