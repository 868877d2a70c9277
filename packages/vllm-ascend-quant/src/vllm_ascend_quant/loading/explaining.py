"""Saying what an error of vLLM's own means when a checkpoint and its config.json do not fit together."""

import contextlib
import textwrap
from collections.abc import Iterator

import torch

from quant_core import LoadError, QuantFormat


@contextlib.contextmanager
def explained(quant_format: QuantFormat) -> Iterator[None]:
    """While a model is built from config.json: what means nothing to a user becomes an error that says where to look.

    Raises:
        LoadError: with vLLM's own words and the sizes that config.json gives.

    """
    try:
        yield
    except (AssertionError, LookupError, ArithmeticError) as error:
        raise LoadError(
            f"vLLM could not build the model that config.json describes: {_in_short(error)}",
            where=quant_format.folder.path,
            found=_sizes_hint(quant_format),
            todo="check that config.json describes the model whose weights these are",
        ) from error


def stopped(
    quant_format: QuantFormat,
    source: QuantFormat | None,
    folder: str,
    last: list[tuple[str, torch.Tensor]],
    error: Exception,
) -> LoadError:
    """The error for whatever vLLM raised while it loaded the last of the tensors that it was given.

    Args:
        quant_format: what the engine was started with.
        source: at a reload, the checkpoint whose tensors were expected; a caller may have sent others.
        folder: the name of the folder.
        last: the last tensor, if there was any.
        error: what was raised.

    """
    name, form = (last[0][0], f"{last[0][1].dtype} {list(last[0][1].shape)}") if last else ("the first tensor", None)
    module, _, suffix = name.rpartition(".")
    if last and last[0][1].numel() == 1 and suffix != "weight" and module in quant_format.modules:
        return LoadError(
            f"vLLM's loader of this model treats all tensors of {module} as if they had the weight's rows, and stopped "
            f"at {suffix}: {_in_short(error)}",
            where=folder,
            found=form,
            todo="leave this module float, or use a type that stores nothing for a whole weight",
        )
    if source is not None and last and (sent := _not_of_the_files(source, *last[0])):
        return LoadError(
            f"vLLM could not load {name}: {_in_short(error)}",
            where="the tensors that were sent",
            found=f"{form}; {sent}",
            todo="send the tensors of a checkpoint in the form of the engine's, under their names there",
        )
    return LoadError(
        f"vLLM could not load {name}: {_in_short(error)}",
        where=folder,
        found="; ".join(filter(None, [form, layers_hint(quant_format)])) or None,
        expected=_sizes_hint(quant_format),
        todo="check that config.json describes the model whose weights these are, and that no tensor was added to them",
    )


def called_directly(quant_format: QuantFormat) -> LoadError:
    """The error for a call of `load_weights` on a model that is being served, as trainers make it."""
    return LoadError(
        "load_weights was called on a model that is being served, whose layers hold their weights in a run-time form",
        where=quant_format.folder.path,
        expected="reload_weights, which brings them back into the form of the checkpoint first",
        todo='call llm.collective_rpc("reload_weights", kwargs={"weights_iterator": ...}) once, with an iterator over '
        "all tensors of the checkpoint; the engine holds what it held before",
    )


def _not_of_the_files(quant_format: QuantFormat, name: str, tensor: torch.Tensor) -> str | None:
    """What tells that a tensor came from a caller and not from the checkpoint's files, if it did."""
    files = quant_format.folder.tensors
    if not files:
        return None
    stored = files.get(name)
    if stored is None:
        return f"{quant_format.folder.path} has no tensor of this name"
    if (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype):
        return None
    return f"{stored.file} holds {stored.dtype} {list(stored.shape)} under this name"


def _sizes_hint(quant_format: QuantFormat) -> str | None:
    """The sizes that config.json asks for."""
    section = quant_format.folder.config
    section = section.get("text_config") or section
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = [f"{name} {section[name]}" for name in names if isinstance(section.get(name), int)]
    return f"what config.json says: {', '.join(sizes)}" if sizes else None


def layers_hint(quant_format: QuantFormat) -> str | None:
    """How many layers config.json asks for and how many the files hold, if the names tell that they differ."""
    section = quant_format.folder.config
    asked = (section.get("text_config") or section).get("num_hidden_layers")
    parts = (name.split(".") for name in quant_format.modules)
    # The first number of a name is the layer's; one behind it may be an expert's.
    numbers = {next((int(part) for part in name if part.isdigit()), 0) for name in parts}
    if not isinstance(asked, int) or not numbers or asked == max(numbers) + 1:
        return None
    return f"config.json asks for {asked} layers, the highest layer number in the files is {max(numbers)}"


def _in_short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}".removesuffix(": "), 300, placeholder=" ...")
