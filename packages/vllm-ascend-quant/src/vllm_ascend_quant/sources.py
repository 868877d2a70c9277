"""Reloading from another folder than the engine was started with."""

from typing import Any

from quant_core import CheckpointFolder, LayerQuery, LoadError
from quant_core.errors import listing
from vllm_ascend_quant.config import AscendQuantizationConfig


def check_source(config: AscendQuantizationConfig, source: Any, started: str) -> CheckpointFolder | None:
    """Check the folder that weights are about to be loaded from, if it is another one, and return it.

    Args:
        config: describes the folder that the engine was started with.
        source: vLLM's model config, whose `model` a reload changes.
        started: what `model` was when the engine was started.

    Raises:
        QuantError: if the folder is wrong by itself.
        LoadError: if there is none, if it quantises a layer in another way, or if it has biases that the first one has
            not.

    """
    if source.model == started:
        return None
    assert config.format is not None
    first = config.format.folder
    folder = CheckpointFolder.locate(source.model, revision=source.revision)
    if folder is None:
        raise LoadError(
            f"{source.model} is neither a folder nor in this machine's Hugging Face cache",
            todo="give the folder of the weights to reload; the engine holds what it held before",
        )
    other = config.format_class().load(folder)
    found = {path: other.layer_quant(LayerQuery(path, modules=q.modules)) for path, q in config.layers.items()}
    wrong = [
        f"{path} was {quant.quant_type or 'FLOAT'} and is {found[path].quant_type or 'FLOAT'}"
        for path, quant in config.layers.items()
        if found[path].quant_type != quant.quant_type
    ]
    # vLLM would drop them without a word; whether those of the first folder have a place was checked.
    biases = [m for m, form in folder.modules.items() if form.has("bias")]
    wrong += [f"{m}.bias is new" for m in biases if not (m in first.modules and first.modules[m].has("bias"))]
    if wrong:
        raise LoadError(
            "the weights to reload are not of the form of those that the engine was started with",
            where=folder.path,
            found=listing(wrong),
            todo="start the engine anew with these weights",
        )
    return folder
