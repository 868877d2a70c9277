"""The three kinds of scheme.

A scheme says which tensors one quantisation type stores for one checkpoint module and what is computed with them. It
knows no engine, no checkpoint format and no device library: it is told about its layer by a `LayerContext`, and
everything that it computes is an operator of `torch.ops.npu` or plain torch.

A complete scheme, in a file or package of its own:

    import torch
    from quant_core import AscendLinearScheme, Param, params, register_scheme

    @register_scheme("W8A8_EXAMPLE", "linear")
    class AscendW8A8ExampleLinearMethod(AscendLinearScheme):
        def get_weight(self, input_size, output_size, params_dtype):
            return {"weight": Param((output_size, input_size), torch.int8, output_dim=0, input_dim=1)}

        def get_perchannel_param(self, output_size, params_dtype):
            scale = Param((output_size, 1), torch.float32, output_dim=0, check=params.positive)
            return {"weight_scale": scale}

        def process_weights_after_loading(self, layer):
            params.replace_parameter(layer, "weight", layer.weight.data.t())

        def apply(self, layer, x, bias=None, tp_rank=0):
            x8, x_scale = torch.ops.npu.npu_dynamic_quant(x)
            return torch.ops.npu.npu_quant_matmul(
                x8, layer.weight, layer.weight_scale.flatten(), pertoken_scale=x_scale, bias=bias, output_dtype=x.dtype
            )

Packages announce such a module in the entry-point group `quant_core.schemes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quant_core.devices import DEVICES, current_device
from quant_core.schemes.context import LayerContext, Shard, StoredForm
from quant_core.schemes.hooks import call_hook
from quant_core.schemes.params import Param


class Scheme(ABC):
    """What all kinds have in common.

    Attributes:
        supported_devices: products that the type runs on.
        granularity: of the weight's scales, for people: "per channel", "per group", "blocks of 32".
        checked_against: of each quantisation type that the class serves, real checkpoints whose independent reference
            its numbers were compared with, all on CPU.
        context: the layer that this instance serves, set by `create`.

    """

    supported_devices: ClassVar[tuple[str, ...]] = DEVICES
    granularity: ClassVar[tuple[str, ...]] = ()
    checked_against: ClassVar[dict[str, tuple[str, ...]]] = {}
    context: LayerContext

    @classmethod
    def create(cls, context: LayerContext) -> Self:
        """An instance for one layer. What it needs to remember it keeps on itself, never on the class."""
        scheme = cls()
        scheme.context = context
        return scheme

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Reasons why this type cannot serve the layer; empty when it can. Asked before a weight is read."""
        device = current_device()
        if device in cls.supported_devices:
            return []
        return [f"needs one of the devices {', '.join(cls.supported_devices)}, this one is {device}"]

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027 - nothing to do is an answer
        """Turn the stored parameters on `layer` into the run-time form.

        Runs again after every reload, with parameters in their stored form, and must then give the same result.
        """


class AscendLinearScheme(Scheme):
    """A quantised linear layer: y = x Wᵀ + b.

    The four `get_*` hooks are given the full sizes of one checkpoint module and declare what is stored for it; cutting
    for tensor parallelism and fusing q/k/v or gate/up is done by whoever allocates the parameters.

    Attributes:
        folds_bias: the stored tensors contain the layer's bias already, so `apply` must not add it. (An engine that
            adds the bias itself, after `apply`, cannot serve such a type.)

    """

    folds_bias: ClassVar[bool] = False

    @abstractmethod
    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """The weight, under the suffix that the checkpoint uses."""

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per checkpoint module."""
        return {}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per output feature."""
        return {}

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per output feature and group of input features."""
        return {}

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """Everything that the hooks declare for one checkpoint module of this size."""
        dtype = self.context.params_dtype
        calls: tuple[tuple[Callable[..., Mapping[str, Any]], tuple[Any, ...]], ...] = (
            (self.get_weight, (input_size, output_size, dtype)),
            (self.get_pertensor_param, (dtype,)),
            (self.get_perchannel_param, (output_size, dtype)),
            (self.get_pergroup_param, (input_size, output_size, dtype)),
        )
        sizes, row_parallel = (input_size, output_size), self.context.partition.kind == "row"
        return {
            name: param
            for hook, arguments in calls
            for name, param in call_hook(hook, arguments, sizes, row_parallel).items()
        }

    @classmethod
    def stored_sizes(cls, form: StoredForm) -> tuple[int, int] | None:
        """(input, output) features of a stored module, None if the shapes do not tell.

        They follow from how much smaller than the layer `get_weight` declares a packed weight.
        """
        features = 1 << 16  # a multiple of whatever a weight is packed by
        shard = Shard(form.module, features, features)
        scheme = cls.create(LayerContext(form.module, "linear", (shard,), features, torch.bfloat16, (form,)))
        arguments = (features, features, torch.bfloat16)
        for name, param in call_hook(scheme.get_weight, arguments, (features, features), False).items():
            shape, out, into = form.shape(name, ()), param.output_dim, param.input_dim
            if out is not None and into is not None and len(shape) == len(param.shape):
                return shape[into] * features // param.shape[into], shape[out] * features // param.shape[out]
        return None

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """The layer's output.

        Args:
            layer: holds the processed parameters.
            x: [..., local input features] in the model's dtype.
            bias: [local output features], None where the layer has none or another rank adds it.
            tp_rank: this layer's tensor-parallel rank; what a row-parallel layer adds once is added on rank 0.

        Returns:
            [..., local output features] in x's dtype.

        """

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Float32 weight [out, in] from the *stored* parameters on `layer`: what `apply` approximates."""
        raise NotImplementedError(f"{type(self).__name__} has no dequantize")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a float weight [out, in] by the type's plain rule, without calibration."""
        raise NotImplementedError(f"{type(self).__name__} needs calibration and cannot quantise by itself")


class AscendMoEScheme(Scheme):
    """Quantised experts. Hooks are given the sizes of all local experts at once."""

    @abstractmethod
    def get_weight(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_size: int, params_dtype: torch.dtype
    ) -> dict[str, Param]:
        """`w13_weight` and `w2_weight`, experts first."""

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_size: int, params_dtype: torch.dtype
    ) -> dict[str, Param]:
        """Scales and offsets of both, experts first."""
        return {}

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Tensor:
        """The weighted sum over the chosen experts.

        Args:
            layer: holds the processed parameters.
            x: [tokens, hidden].
            topk_weights: [tokens, k] float32.
            topk_ids: [tokens, k] global expert ids.
            **kwargs: what the engine adds.

        """


class AscendAttentionScheme(Scheme):
    """A quantised key/value cache.

    Attributes:
        cache_dtype: what the cache holds.

    """

    cache_dtype: ClassVar[torch.dtype]

    @abstractmethod
    def get_params(self, num_kv_heads: int, head_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Scales and offsets of keys and values."""

    @abstractmethod
    def bytes_per_token_per_head(self, head_size: int) -> int:
        """What one token's key and value take in the cache, per key/value head."""

    @abstractmethod
    def apply(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attention over the quantised cache."""
