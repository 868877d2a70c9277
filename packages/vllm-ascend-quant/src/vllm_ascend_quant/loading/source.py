"""Reloading from another folder than the engine was started with."""

from quant_core import CheckpointFolder, LayerQuery, LoadError, QuantFormat
from quant_core.errors import listing
from vllm_ascend_quant.loading.contents import check_tails
from vllm_ascend_quant.served_model import ServedModel


def check_source(served: ServedModel, started: str) -> QuantFormat | None:
    """Check the folder that weights are about to be loaded from, if it is another one, and return its checkpoint.

    Args:
        served: the model, whose `model_config.model` a reload changes.
        started: what that was when the engine was started.

    Raises:
        QuantError: if the folder is wrong by itself.
        LoadError: if there is none, if it quantises a layer in another way, or if it has biases that the first one has
            not.

    """
    now = served.model_config.model
    if now == started:
        return None
    folder = CheckpointFolder.locate(now, revision=served.model_config.revision)
    if folder is None:
        raise LoadError(
            f"{now} is neither a folder nor in this machine's Hugging Face cache",
            todo="give the folder of the weights to reload; the engine holds what it held before",
        )
    other = type(served.format).load(folder)
    check_tails(folder)
    found = {path: other.layer_quant(LayerQuery(path, modules=q.modules)) for path, q in served.layers.items()}
    wrong = [
        f"{path} was {quant.quant_type or 'FLOAT'} and is {found[path].quant_type or 'FLOAT'}"
        for path, quant in served.layers.items()
        if found[path].quant_type != quant.quant_type
    ]
    caches = {module: quant for quant in served.caches.values() for module in quant.modules}
    for module in sorted(caches.keys() | other.caches.keys()):
        types = [side[module].quant_type if module in side else "FLOAT" for side in (caches, other.caches)]
        if types[0] != types[1]:
            wrong.append(f"the cache of {module} was {types[0]} and is {types[1]}")
    # vLLM would drop them without a word; whether those of the first folder have a place was checked.
    first = served.modules
    biases = [module for module, form in other.modules.items() if form.has("bias")]
    wrong += [f"{module}.bias is new" for module in biases if not (module in first and first[module].has("bias"))]
    if wrong:
        raise LoadError(
            "the weights to reload are not of the form of those that the engine was started with",
            where=folder.path,
            found=listing(wrong),
            todo="start the engine anew with these weights",
        )
    return other
