"""Additions: what a checkpoint may store beside the tensors of a linear layer, whatever the layer's type.

A rotation turns the input before the scheme sees it, a low-rank part is added to what the scheme answers. Each is a
class of this package, which takes part wherever a format states it (`StoredForm.transforms`).
"""

from abc import ABC
from typing import ClassVar

from torch import Tensor, nn

from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import Param, replace_parameter, tensor_of


class Addition(ABC):
    """One addition to one layer.

    Attributes:
        name: what formats call it.
        suffixes: the tensors that it stores, all of them in every module that has it.
        context: the layer.

    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, context: LinearContext) -> None:
        self.context = context

    @classmethod
    def can_serve(cls, context: LinearContext) -> list[str]:
        """Reasons why it cannot be applied to this layer; empty when it can."""
        return []

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """What one checkpoint module of this size stores for it."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring its tensors into the model's dtype."""
        for name in self.suffixes:
            replace_parameter(layer, name, tensor_of(layer, name).data.to(self.context.params_dtype))

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The input [..., in] as the scheme shall see it."""
        return x

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output [..., out] for the layer's own input x, given the scheme's output."""
        return y

    def turned_back(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight [out, in] for the input as it comes, given the one for the input as the scheme sees it."""
        return weight

    def completed(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight [out, in] with what is added to the scheme's output."""
        return weight
