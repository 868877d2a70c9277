"""A scheme together with the additions that a layer's files ask for."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_core.schemes.additions import ADDITIONS, Addition
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.params import Param
from quant_core.storage import Storage


class ComposedLinearMethod(AscendLinearScheme):
    """Additions around the scheme of the layer's type.

    Attributes:
        base: the scheme.
        additions: applied in this order before it, and after it.

    """

    def __init__(self, base: AscendLinearScheme, additions: Sequence[Addition]) -> None:
        self.base = base
        self.additions = tuple(additions)
        self.context = base.context
        self.folds_bias = base.folds_bias  # type: ignore[misc]

    @functools.cached_property
    def storage(self) -> Storage:
        """The base's."""
        return self.base.storage

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        """The base's."""
        return self.base.get_weight(input_size, output_size, params_dtype)

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """The base's and the additions'."""
        declared = self.base.params(input_size, output_size)
        for addition in self.additions:
            declared |= addition.params(input_size, output_size)
        return declared

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Each processes its own."""
        self.base.process_weights_after_loading(layer)
        for addition in self.additions:
            addition.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """What is added counts from the input as it came."""
        changed = x
        for addition in self.additions:
            changed = addition.before(layer, changed)
        y = self.base.apply(layer, changed, bias, tp_rank)
        for addition in self.additions:
            y = addition.after(layer, x, y)
        return y

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The base's tensors; what is added is found by calibration only."""
        return self.base.quantize(weight)

    def dequantize(self, layer: nn.Module) -> Tensor:
        """The weight that `apply` multiplies the input by as it comes, with what is added."""
        weight = self.base.dequantize(layer)
        for addition in reversed(self.additions):
            weight = addition.turned_back(layer, weight)
        for addition in self.additions:
            weight = addition.completed(layer, weight)
        return weight


def reasons_against(scheme_class: type[Scheme], context: LayerContext) -> list[str]:
    """Why a scheme, or an addition that the files ask for, cannot serve a layer; empty when they can."""
    reasons = scheme_class.can_serve(context)
    if isinstance(context, LinearContext):
        unknown = set(context.form.transforms) - {addition.name for addition in ADDITIONS}
        reasons += [f"nothing applies the transform {name!r}, which the format states" for name in sorted(unknown)]
        for addition in _stated(context):
            reasons += addition.can_serve(context)
    return reasons


def compose(scheme_class: type[Scheme], context: LayerContext) -> Scheme:
    """An instance for one layer, with the additions that its files ask for."""
    scheme = scheme_class.create(context)
    if not isinstance(context, LinearContext) or not isinstance(scheme, AscendLinearScheme):
        return scheme
    additions = [addition(context) for addition in _stated(context)]
    return ComposedLinearMethod(scheme, additions) if additions else scheme


def _stated(context: LinearContext) -> list[type[Addition]]:
    return [addition for addition in ADDITIONS if addition.name in context.form.transforms]
