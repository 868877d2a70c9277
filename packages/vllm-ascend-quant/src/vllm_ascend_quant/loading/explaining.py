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
    quant_format: QuantFormat, folder: str, last: list[tuple[str, torch.Tensor]], error: Exception
) -> LoadError:
    """The error for whatever vLLM raised while it loaded the last of the tensors that it was given."""
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
    return LoadError(
        f"vLLM could not load {name}: {_in_short(error)}",
        where=folder,
        found="; ".join(filter(None, [form, layers_hint(quant_format)])) or None,
        expected=_sizes_hint(quant_format),
        todo="check that config.json describes the model whose weights these are, and that no tensor was added to them",
    )


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
