"""Linear layers."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quant_core import (
    AscendLinearScheme,
    LayerQuant,
    LayerQuery,
    LimitError,
    LinearSizes,
    LoadError,
    Partition,
    QuantFormat,
    create_scheme,
)
from quant_core.errors import listing
from quant_core.schemes.filling import Filling
from quant_core.schemes.handover import check_shared, hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.verify import absent_params, check_values, linear_params
from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.exact_tp import exact_tp_wanted, max_over_ranks
from vllm_ascend_quant.methods.parameter import AscendParameter, align_rows, load_replicated, make_parameter


class AscendLinearMethod(LinearMethodBase):
    """Turns a scheme's declarations into vLLM parameters and delegates the rest.

    Attributes:
        format: the checkpoint, which makes the scheme.
        name: the layer's, for messages: vLLM's while the model is being built, then its path.
        quant: the format's answer about the layer.
        quant_method: the scheme, once the layer's sizes are known.
        absent: what the scheme declares and the files lack, which it is handed as zeros.
        restored: whether the layer was processed before it is filled, and is not to be processed again; see
            files/saved_state.py.
        made_up: whether the first weights are made up (`load_format="dummy"`), so that their values mean nothing.
        read_back: whether vLLM asks for the layer's float weight once it was processed; see `read_weight`.

    """

    def __init__(self, quant_format: QuantFormat, name: str, quant: LayerQuant, made_up: bool) -> None:
        self.format = quant_format
        self.name = name
        self.quant = quant
        self.quant_method: AscendLinearScheme
        self.restored = False
        self.made_up = made_up
        self.read_back = False
        self._float_weight: torch.Tensor | None = None

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
        """Create the scheme, check it against limits and files, and register its parameters.

        Raises:
            QuantError: as quant_core.create_scheme, and for sizes that cannot be cut.

        """
        assert isinstance(layer, LinearBase)
        scheme = self.make_scheme(layer, input_size, output_partition_sizes, params_dtype)
        self.refuse_bias_added_twice(layer)
        # Not by `register_weight_loader_v2_supported_method`: it goes by names of classes, and vllm-ascend has one of
        # this name whose parameters cannot be loaded so.
        loader: Callable[..., None] = load_replicated
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            loader = layer.weight_loader_v2
        self.add_parameters(layer, loader)
        # Schemes written for vllm-ascend remember sizes that a hook was given: those of the whole layer on this rank.
        scheme.params(input_size_per_partition, sum(output_partition_sizes))

    def refuse_bias_added_twice(self, layer: LinearBase) -> None:
        """See that no layer hands a bias to the model that its type stores inside the weights.

        Raises:
            LimitError: if it does.

        """
        if self.quant_method.folds_bias and compat.has_bias(layer) and layer.skip_bias_add:
            raise LimitError(
                f"{self.name}: this layer hands its bias to the model, but {self.quant.quant_type} stores it inside "
                "the weights, so it would be added twice",
                todo="quantise this layer with a type that keeps the bias apart",
            )

    def make_scheme(
        self, layer: nn.Module, input_size: int, local_sizes: list[int], params_dtype: torch.dtype
    ) -> AscendLinearScheme:
        """The scheme for the layer, kept in `quant_method`; raises as quant_core.create_scheme."""
        query = LayerQuery(
            name=self.name,
            layer_class=layer_class(layer),
            modules=self.quant.modules,
            sizes=LinearSizes(input_size, full_sizes(layer, local_sizes), tuple(local_sizes)),
            params_dtype=params_dtype,
            partition=_partition(layer),
            has_bias=compat.has_bias(layer),
            role=instance_role(),
            values_later=self.made_up,
        )
        self.quant = self.format.layer_quant(query)  # again: sizes may tell how something is packed
        scheme = create_scheme(query, self.quant)
        assert isinstance(scheme, AscendLinearScheme)
        self.quant_method = scheme
        return scheme

    def add_parameters(self, layer: nn.Module, loader: Callable[..., None]) -> None:
        """Register what the scheme stores.

        Raises:
            LimitError: for sizes that cannot be cut.

        """
        scheme = self.quant_method
        self.absent = layouts_of(absent_params(scheme), scheme.context)
        for name, layout in layouts_of(linear_params(scheme), scheme.context).items():
            filling = Filling(layout, self.name, scheme.context.modules)
            layer.register_parameter(name, make_parameter(filling, loader))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything was loaded and makes sense, then let the scheme build its run-time form.

        Raises:
            LoadError: names what was not loaded, or values that cannot be used.
            LimitError: if the model's loader rearranged rows in a way that this type cannot follow.

        """
        if self.restored:
            self.restored = False
            self._float_weight = None  # of what the layer held before
            return
        stored = stored_parameters(layer)
        if not self.made_up or any(param.filling.filled for param in stored.values()):
            self._check(layer)
            align_rows(self.name, stored)
        else:
            for param in stored.values():
                compat.make_up(param)
        for param in stored.values():
            param.begin_again()
        self.make_run_time_form(layer)

    def make_run_time_form(self, layer: nn.Module) -> None:
        """Let the scheme process what was loaded."""
        hand_over(layer, [param.filling.layout for param in stored_parameters(layer).values()], self.absent.values())
        if self.read_back:
            with contextlib.suppress(NotImplementedError):  # a type that cannot
                self._float_weight = self.quant_method.dequantize(layer)
        self.quant_method.process_weights_after_loading(layer)

    def read_weight(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The float weight [out, in] that was loaded last, once; None where unit vectors show it without error.

        Raises:
            LimitError: if it is known no longer, and would be seen with the errors that the type makes on its input.

        """
        weight, self._float_weight = self._float_weight, None
        if weight is None and type(self.quant_method).dequantize is not AscendLinearScheme.dequantize:
            raise LimitError(
                f"{self.name}: vLLM's latent attention needs this layer's weight in float",
                found=f"a processed {self.quant.quant_type} layer, as a saved state has it",
                todo="serve the checkpoint itself",
            )
        return None if weight is None else weight.to(dtype)

    def missing(self, layer: nn.Module) -> list[str]:
        """The stored tensors that were not loaded since the layer was last processed."""
        form = self.quant_method.context.form
        return [
            f"{module}.{form.spelling.get(name, name)}"
            for name, param in stored_parameters(layer).items()
            for module in param.filling.missing()
        ]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The scheme's output."""
        return self.quant_method.apply(layer, x, bias, self.quant_method.context.partition.rank)

    def _check(self, layer: nn.Module) -> None:
        missing = self.missing(layer)
        if missing:
            raise LoadError(
                f"{self.name}: {len(missing)} stored parameters were never loaded: {listing(missing)}",
                where=listing(str(evidence) for evidence in self.quant.evidence),
                todo="the weights that were sent lack these tensors: check the files, or the iterator of a reload",
            )
        context = self.quant_method.context
        for name, param in stored_parameters(layer).items():
            if param.filling.layout.axis is None:
                check_shared(context, name, param.data)
            for module, part in param.filling.parts(param.data):
                tensor = f"{module}.{context.form.spelling.get(name, name)}"
                check_values(self.name, [tensor], param.filling.layout.param, part)


def stored_parameters(layer: nn.Module) -> dict[str, AscendParameter]:
    """The parameters of a layer that are in their stored form."""
    return {n: p for n, p in layer.named_parameters(recurse=False) if isinstance(p, AscendParameter)}


def layer_class(layer: nn.Module) -> str:
    """The class of a layer in the words of configs."""
    if isinstance(layer, ParallelLMHead):
        return "lm_head"
    return "Embedding" if isinstance(layer, VocabParallelEmbedding) else "Linear"


def _partition(layer: nn.Module) -> Partition:
    if isinstance(layer, RowParallelLinear):
        exact = layer.tp_size > 1 and exact_tp_wanted()
        return Partition("row", layer.tp_rank, layer.tp_size, max_over_ranks if exact else None)
    if isinstance(layer, (ColumnParallelLinear, VocabParallelEmbedding)):
        return Partition("column", *compat.rank_of(layer))
    return Partition()


def instance_role() -> Literal["prefill", "decode", "both"]:
    """Which requests this instance serves, where prefill and decode are disaggregated."""
    transfer = get_current_vllm_config().kv_transfer_config
    role = None if transfer is None else transfer.kv_role
    return "prefill" if role == "kv_producer" else "decode" if role == "kv_consumer" else "both"


def full_sizes(layer: nn.Module, local: list[int]) -> tuple[int, ...]:
    """Each member's output features over all ranks: heads may be held by several of them, a vocabulary is padded."""
    if isinstance(layer, VocabParallelEmbedding):
        return (layer.org_vocab_size,)
    if isinstance(layer, QKVParallelLinear) and len(local) == 3:  # q, k, v
        return (
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        )
    parts = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
    return tuple(size * parts for size in local)
