"""Additions: what a checkpoint may store beside the tensors of a linear layer, whatever the layer's type.

A rotation turns the input before the scheme sees it, a low-rank part is added to what the scheme answers. Each is a
class of this package, which takes part wherever the files hold its tensors.
"""

from abc import ABC
from typing import ClassVar

from torch import Tensor, nn

from quant_core.schemes.context import LayerContext, StoredForm
from quant_core.schemes.params import Param, replace_parameter, tensor_of


class Addition(ABC):
    """One addition to one layer.

    Attributes:
        suffixes: the tensors that it stores, all of them in every module that has one.
        context: the layer.

    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, context: LayerContext) -> None:
        self.context = context

    @classmethod
    def belongs(cls, form: StoredForm) -> bool:
        """Whether a module stores any of its tensors."""
        return any(form.has(suffix) for suffix in cls.suffixes)

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
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
