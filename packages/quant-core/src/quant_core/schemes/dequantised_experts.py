"""Experts of the types whose weight is dequantised once after loading."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.dequantised import DequantisedLinearScheme, scaled
from quant_core.schemes.experts import AscendMoEScheme, grouped
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.routing import Codes, Rows


class DequantisedMoEScheme(AscendMoEScheme):
    """Each product as in a linear layer of the type.

    Run time, of E experts on this rank:
        w13_weight, w2_weight: model dtype [E, in, out], views of [E, out, in]
    """

    linear: ClassVar[type[DequantisedLinearScheme]]

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """As the linear scheme does, turned."""
        linear.process_weights_after_loading(module)
        replace_parameter(module, "weight", tensor_of(module, "weight").t())

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """Rows as their codes hold them, and what their products are multiplied by."""
        linear = self.halves[half]
        assert isinstance(linear, DequantisedLinearScheme)
        return linear.round_rows(x)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """One operator, of floating rows and weights."""
        y = grouped(layer, half, rows._replace(scale=None))
        return y if rows.scale is None else scaled(y, rows.scale)
