"""What all storages have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quant_core.schemes.params import Param
from quant_core.stored import StoredForm, WeightForm

#: The stored tensors of one module, or of the fused members of a layer, by canonical suffix.
Tensors = Mapping[str, Tensor]


class Storage(ABC):
    """The tensors that hold one module's weight.

    The four methods that declare them are named as the hooks of a linear scheme, which answers from them.

    Attributes:
        form: the module, as its format states it.
        weight: how its weight is stored: what the form states, or the type's usual form where it states nothing.

    """

    def __init__(self, form: StoredForm, usual: WeightForm) -> None:
        self.form = form
        self.weight = usual if form.weight is None else form.weight

    @abstractmethod
    def get_weight(self, input_size: int, output_size: int) -> dict[str, Param]:
        """The weight of a module of this size."""

    def get_pertensor_param(self) -> dict[str, Param]:
        """What has one value for the module."""
        return {}

    def get_perchannel_param(self, output_size: int) -> dict[str, Param]:
        """What has one value for each output feature."""
        return {}

    def get_pergroup_param(self, input_size: int, output_size: int) -> dict[str, Param]:
        """What has one value for each output feature and group of input features."""
        return {}

    @abstractmethod
    def keeps(self) -> bool:
        """Whether a weight of the form that is stated is kept by tensors of this kind."""

    def reasons_against(self, input_size: int) -> list[str]:
        """Why a module of so many input features cannot be stored like this; empty when it can."""
        return []

    def reasons_against_outputs(self, output_size: int) -> list[str]:
        """Why a module of so many output features cannot be stored like this; empty when it can."""
        return []

    @abstractmethod
    def dequantize(self, tensors: Tensors) -> Tensor:
        """The float32 weight [out, in]."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a float weight [out, in] by the plain rule.

        Raises:
            NotImplementedError: where only calibration finds them.

        """
        raise NotImplementedError(f"{type(self).__name__} needs calibration and cannot quantise by itself")

    def groups(self, input_size: int) -> int:
        """How many groups so many input features form; 1 without groups."""
        return groups_of(input_size, self.weight.group_size if self.weight.strategy == "group" else None)


def unequal(form: StoredForm, suffix: str, input_size: int, groups: int) -> str:
    """Why so many input features cannot have so many groups, with the tensor that tells how many there are."""
    found, expected = form.found(suffix), [str(size) for size in form.shape(suffix, ())]
    reason = f"{input_size} input features cannot be cut into {groups} equal groups"
    if not found:
        return reason
    expected[1:2] = [f"a divisor of {input_size}"]
    return f"{reason}: {found}, expected [{', '.join(expected)}]"


def groups_of(input_size: int, group_size: int | None) -> int:
    """Groups of so many input features; the last one may be short. 1 without a group size."""
    return 1 if group_size is None else -(-input_size // group_size)


def tensors_of(layer: nn.Module) -> Tensors:
    """What a layer holds under the names of its stored parameters."""
    return {name: param.data for name, param in layer.named_parameters(recurse=False)}


def expanded(values: Tensor, input_size: int) -> Tensor:
    """Values of groups [out, g] as values of input features [out, in]; [out, 1] stays."""
    groups = values.shape[1]
    return values if groups == 1 else values.repeat_interleave(-(-input_size // groups), dim=1)[:, :input_size]


def ones_where_zero(scale: Tensor) -> Tensor:
    """A scale by which can be divided: what has no magnitude gets 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
