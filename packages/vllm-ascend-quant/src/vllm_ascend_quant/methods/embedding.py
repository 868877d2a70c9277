"""Vocabulary layers: a quantised `lm_head` multiplies as a linear layer, a quantised embedding looks rows up.

A head that is tied to a quantised embedding is the embedding itself, which then does both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quant_core import AscendLinearScheme, LimitError
from quant_core.schemes.handover import hand_over
from quant_core.schemes.params import replace_parameter
from vllm_ascend_quant.methods.linear import AscendLinearMethod, stored_parameters
from vllm_ascend_quant.methods.parameter import load_vocabulary


class AscendEmbeddingMethod(AscendLinearMethod):
    """Serves a vocabulary layer with the type's linear scheme.

    vLLM pads the vocabulary and cuts it over the ranks; the rows beyond the checkpoint's are made up.

    An embedding keeps what is stored, of which single rows are dequantised. What it multiplies by, if it is a head too,
    is made when it is first asked to: some models hand their embedding to the logits without calling it a head. The
    scales of a static type's input are then the head's, since a looked-up token has no input that could be quantised.
    """

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As AscendLinearMethod.create_weights; a LimitError too if a row cannot be looked up by itself."""
        assert isinstance(layer, VocabParallelEmbedding)
        self.make_scheme(layer, input_size, output_partition_sizes, params_dtype)
        self.add_parameters(layer, load_vocabulary)
        for param in stored_parameters(layer).values():
            param.vocabulary = (layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index)
        if not isinstance(layer, ParallelLMHead):
            self._check_rows(layer)

    def _check_rows(self, layer: nn.Module) -> None:
        packed = [name for name, param in stored_parameters(layer).items() if param.param.output_step > 1]
        scheme = type(self.quant_method)
        plain = scheme.dequantize is AscendLinearScheme.dequantize and scheme.stores is None
        if packed or plain:
            raise LimitError(
                f"{self.name}: the rows of an embedding cannot be looked up in {self.quant.quant_type}",
                found=f"several rows in one of {', '.join(packed)}" if packed else "a scheme without dequantize",
                todo="leave the embedding in float, or quantise it with a type that stores each row by itself",
            )

    def make_run_time_form(self, layer: nn.Module) -> None:
        """A head is a linear layer; an embedding keeps what is stored."""
        self._head: nn.Module | None = None
        if isinstance(layer, ParallelLMHead):
            super().make_run_time_form(layer)
            return
        stored = stored_parameters(layer)
        self._axes = {name: 0 if p.param.per_row else p.param.output_dim for name, p in stored.items()}
        hand_over(layer, [param.filling.layout for param in stored.values()], ())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of hidden states, by a head or by an embedding in its place."""
        if isinstance(layer, ParallelLMHead):
            return super().apply(layer, x, bias)
        if self._head is None:
            self._head = self._as_head(layer)
        return super().apply(self._head, x, bias)

    def _as_head(self, layer: nn.Module) -> nn.Module:
        """A layer with the run-time form of an embedding's weight. No part of the model, as it can be made again."""
        head = nn.Module()
        for name in self._axes:
            replace_parameter(head, name, layer.get_parameter(name).data)
        hand_over(head, (), self.absent.values())
        self.quant_method.process_weights_after_loading(head)
        return head

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """The rows of the tokens [...], dequantised: [..., embedding size] in the model's dtype."""
        assert isinstance(layer, VocabParallelEmbedding)
        rows = Rows()
        for name, axis in self._axes.items():
            value = layer.get_parameter(name)
            setattr(rows, name, value if axis is None else value.index_select(axis, input_.flatten()))
        values = self.quant_method.dequantize(rows)  # type: ignore[arg-type]
        return values.to(self.quant_method.context.params_dtype).view(*input_.shape, layer.embedding_dim)


class Rows:
    """Some rows of a layer's stored parameters, as attributes, in the place of the layer."""

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The rows of all parameters."""
        yield from vars(self).items()

    def get_parameter(self, name: str) -> Tensor:
        """The rows of one parameter."""
        found: Tensor = getattr(self, name)
        return found
