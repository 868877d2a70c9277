"""Types whose weight is dequantised once after loading, because no operator multiplies what is stored."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.context import LayerContext, LinearContext
from quant_core.schemes.float_inputs import rounded
from quant_core.schemes.params import replace_parameter, tensor_of
from quant_core.schemes.run_time import drop
from quant_core.storage import tensors_of
from quant_core.stored import ActivationForm


class DequantisedLinearScheme(AscendLinearScheme):
    """y = x̂ Ŵᵀ + bias, where Ŵ is the dequantised weight and x̂ the input, quantised and dequantised as is stated.

    A type says what it stores and how its input is quantised. Plain arithmetic, on every product: it takes the memory
    of a float model and gives the numbers of the quantised one.

    Run time:
        weight: model dtype [out, in]

    Attributes:
        kept: what is stored and needed at run time, beside the weight.

    """

    kept: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Those of all linear types; and ranks hold whole groups of the input, which would have other scales else."""
        assert isinstance(context, LinearContext)
        reasons, form = super().can_serve(context), cls.input_of(context)
        parts, length = context.partition.input_parts, form.group_size if form else None
        if length is None or parts == 1 or context.input_size % (parts * length) == 0:
            return reasons
        works = [str(n) for n in range(parts - 1, 0, -1) if n == 1 or context.input_size % (n * length) == 0]
        return [
            *reasons,
            f"{context.input_size} input features cannot be cut over {parts} tensor-parallel ranks into whole groups "
            f"of {length} that share a scale of the input (tensor_parallel_size {', '.join(works)} would fit)",
        ]

    @classmethod
    def input_of(cls, context: LinearContext) -> ActivationForm | None:
        """How the input of a layer is quantised."""
        return context.form.input or cls.activation

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Dequantise the weight, drop everything else that was stored.

        On the host, which can cast from FP8; not every NPU can.
        """
        weight = self.storage.dequantize({name: stored.cpu() for name, stored in tensors_of(layer).items()})
        device = layer.get_parameter("weight").device
        declared = self.params(self.context.input_size, self.context.shards[0].output_size)
        drop(layer, *(declared.keys() - {"weight", *self.kept}))
        replace_parameter(layer, "weight", weight.to(self.context.params_dtype).to(device))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        """One plain product."""
        y = self.multiply(x.reshape(-1, x.shape[-1]), tensor_of(layer, "weight"), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def round_rows(self, rows: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows [m, in] as their codes hold them, and what their products are multiplied by; see float_inputs.py."""
        return rounded(rows, self.input_of(self.context), self.context.partition, global_scale)

    def multiply(self, rows: Tensor, weight: Tensor, bias: Tensor | None, global_scale: Tensor | None = None) -> Tensor:
        """Rows [m, in], which are rounded first, times a weight [out, in]."""
        values, factor = self.round_rows(rows, global_scale)
        y = functional.linear(values, weight, bias if factor is None else None)
        return y if factor is None else scaled(y, factor, bias)


def scaled(y: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product [m, out] times a factor of its rows [m], or of all (), and a bias, in the product's dtype."""
    result = y.to(torch.float32) * factor[..., None]
    return (result if bias is None else result + bias).to(y.dtype)
