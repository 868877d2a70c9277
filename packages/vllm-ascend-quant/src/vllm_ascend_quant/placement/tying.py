"""Vocabulary layers that share one weight, as a tied head does with the embedding.

vLLM ties them while it builds a model, before layers are decided by their paths: most often it gives the head the
embedding's parameter. A quantised weight is more than one parameter, and what a head multiplies by is not what an
embedding looks up, so the embedding itself takes the head's place then.
"""

from collections.abc import Iterable

from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quant_core import LimitError
from quant_core.errors import listing
from vllm_ascend_quant.methods.embedding import AscendEmbeddingMethod
from vllm_ascend_quant.served_model import ServedModel


def shared_tables(model: nn.Module) -> list[list[VocabParallelEmbedding]]:
    """Groups of layers that vLLM gave one weight, embeddings before heads. What is one layer already is no group."""
    groups: dict[int, list[VocabParallelEmbedding]] = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and "weight" in module._parameters:
            groups.setdefault(id(module._parameters["weight"]), []).append(module)
    return [sorted(group, key=lambda t: isinstance(t, ParallelLMHead)) for group in groups.values() if len(group) > 1]


def tie_again(model: nn.Module, groups: Iterable[list[VocabParallelEmbedding]], served: ServedModel) -> None:
    """Let each group share again what was decided about its embedding.

    Raises:
        LimitError: if one of a group is quantised, and another has something of its own.

    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for owner, *others in groups:
        quantised = [table for table in (owner, *others) if isinstance(table.quant_method, AscendEmbeddingMethod)]
        for table in others:
            if not quantised:
                table.weight = owner.weight  # which was made again if vLLM had taken it for quantised
                continue
            if quantised != [owner] or any(path in served.layers for path in paths[table]):
                raise stored_apart([*paths[table], *paths[owner]])
            if getattr(table, "bias", None) is not None:
                raise LimitError(
                    f"{paths[table][0]} has a bias and is tied to {paths[owner][0]}, which is quantised",
                    todo="leave the embedding in float, or save the head beside it and untie them in config.json",
                )
            _replace(model, paths[table], owner)


def _replace(model: nn.Module, paths: Iterable[str], owner: VocabParallelEmbedding) -> None:
    if not hasattr(owner, "bias"):
        owner.register_parameter("bias", None)  # some models read that of their head
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, owner)


def stored_apart(layers: list[str]) -> LimitError:
    """The error about layers that the model ties and the files store one by one, quantised."""
    return LimitError(
        f"{layers[0]}: the model ties it to another layer, but the checkpoint stores a quantised weight of its own",
        found=f"one layer in the model for {listing(layers)}",
        expected="one quantised weight for all of them, that of the embedding, or float weights",
        todo="set tie_word_embeddings to false if head and embedding differ; otherwise leave the head's out",
    )
