"""What all schemes have in common, and those of linear layers; experts and attention have files of their own.

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

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quant_core.devices import DEVICES, current_device
from quant_core.errors import RegistrationError
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.hooks import call_hook
from quant_core.schemes.params import Param
from quant_core.storage import FP8Storage, IntegerStorage, MicroscaledStorage, NVFP4Storage, Storage, tensors_of
from quant_core.stored import ActivationForm, StoredForm, WeightForm

_HOOKS = frozenset({"get_weight", "get_pertensor_param", "get_perchannel_param", "get_pergroup_param", "params"})


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
    for tensor parallelism and fusing q/k/v or gate/up is done by whoever allocates the parameters. A type whose weight
    is kept by a storage of `quant_core.storage` names it in `stores` and overrides none of them.

    Attributes:
        stores: how the type's weight is stored where a format does not say otherwise; None for a type that declares
            its parameters itself.
        activation: how the type quantises a layer's input where a format does not say otherwise; None for not at all.
        strategies: what may share a scale of the weight.
        takes_offsets: whether the type computes with weights that are not symmetric, whatever `stores` says.
        takes_index: whether it computes with groups that are not made of neighbours (`WeightForm.indexed`).
        declares: the hooks that the type overrides without saying in `stores` what it stores: of what they declare, a
            format can state nothing.
        storage_class: the storage; None takes the one for what `stores` says.
        folds_bias: the stored tensors contain the layer's bias already, so `apply` must not add it. (An engine that
            adds the bias itself, after `apply`, cannot serve such a type.)

    """

    stores: ClassVar[WeightForm | None] = None
    activation: ClassVar[ActivationForm | None] = None
    strategies: ClassVar[tuple[str, ...]] = ("channel",)
    takes_offsets: ClassVar[bool] = False
    takes_index: ClassVar[bool] = False
    declares: ClassVar[frozenset[str]] = _HOOKS
    storage_class: ClassVar[type[Storage] | None] = None
    folds_bias: ClassVar[bool] = False
    context: LinearContext

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stores" in vars(cls):
            cls.declares = frozenset() if cls.stores is not None else _HOOKS
        else:
            cls.declares |= _HOOKS & vars(cls).keys()

    @classmethod
    def storage_of(cls, form: StoredForm) -> Storage | None:
        """The storage of a module's weight; None for a type that has none."""
        if cls.stores is None:
            return None
        stated = form.weight or cls.stores
        if "get_weight" in cls.declares:  # whoever declares a packed weight unpacks it
            stated = replace(stated, packing=None)
            form = replace(form, weight=stated)
        if cls.storage_class is not None:
            return cls.storage_class(form, cls.stores)
        if stated.type == "int":
            return IntegerStorage(form, cls.stores)
        kinds = {None: FP8Storage, torch.uint8: MicroscaledStorage}
        return kinds.get(stated.scale_dtype, NVFP4Storage)(form, cls.stores)

    @classmethod
    def takes_input(cls, form: ActivationForm) -> bool:
        """Whether the type quantises a layer's input as a format states it."""
        return form == cls.activation

    @functools.cached_property
    def storage(self) -> Storage:
        """The storage of this layer's weight.

        Raises:
            RegistrationError: for a type that declares its parameters itself, and has none.

        """
        found = self.storage_of(self.context.form)
        if found is None:
            raise RegistrationError(f"{type(self).__name__} has neither `stores` nor a `get_weight` of its own")
        return found

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """The device's reasons, those of the form that is stated, and the storage's."""
        assert isinstance(context, LinearContext)
        reasons, storage = super().can_serve(context), cls.storage_of(context.form)
        if storage is None or cls.declares:
            return reasons
        unfit = cls._unlike(storage, context.form) or storage.reasons_against(context.input_size)
        outputs = dict.fromkeys(shard.output_size for shard in context.shards)
        return reasons + (unfit or [reason for size in outputs for reason in storage.reasons_against_outputs(size)])

    @classmethod
    def _unlike(cls, storage: Storage, form: StoredForm) -> list[str]:
        """What is stated of a module and is not this type's."""
        usual, stated = cls.stores, storage.weight
        assert usual is not None
        unlike = {
            f"{stated.type}{stated.num_bits} weights": (stated.type, stated.num_bits) != (usual.type, usual.num_bits),
            "asymmetric weights": usual.symmetric and not stated.symmetric and not cls.takes_offsets,
            "stored index of groups (weight_g_idx)": stated.indexed and not cls.takes_index,
            f"scales per {stated.strategy}": stated.strategy not in cls.strategies,
            f"such a form ({stated})": not storage.keeps(),
            f"such activations ({form.input})": form.input is not None and not cls.takes_input(form.input),
        }
        first = next((what for what, wrong in unlike.items() if wrong), None)
        if first is None:
            return []
        found = form.found("weight_scale") if first.startswith("scales") else ""
        return [f"{cls.__name__} has no {first}, which the format states{f': {found}' if found else ''}"]

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """The weight, under its canonical suffix."""
        return self.storage.get_weight(input_size, output_size)

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per checkpoint module."""
        return {} if self.stores is None else self.storage.get_pertensor_param()

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per output feature."""
        return {} if self.stores is None else self.storage.get_perchannel_param(output_size)

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """Parameters with one value per output feature and group of input features."""
        return {} if self.stores is None else self.storage.get_pergroup_param(input_size, output_size)

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
        if self.stores is None:
            raise NotImplementedError(f"{type(self).__name__} has no dequantize")
        return self.storage.dequantize(tensors_of(layer))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a float weight [out, in] by the type's plain rule, without calibration."""
        if self.stores is None:
            raise NotImplementedError(f"{type(self).__name__} needs calibration and cannot quantise by itself")
        return self.storage.quantize(weight)
