"""What a test of every linear type is run with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core import AscendLinearScheme

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A scheme, a form of its stored tensors, and a model dtype.

    Attributes:
        distinct_scales: members of a fused layer have input scales of their own.
        device: whose run-time form the weight takes.
        error: how far outputs may be from those of the dequantised weight, relative to their norm.

    """

    scheme: type[AscendLinearScheme]
    make: Callable[..., Stored]
    dtype: torch.dtype = torch.float32
    distinct_scales: bool = False
    device: str = "cpu"
    error: float = 0.02

    def members(self, sizes: tuple[int, ...], inputs: int) -> list[Stored]:
        """Stored modules of these output sizes."""
        options = [{"input_scale": 0.02 + 0.01 * i} if self.distinct_scales else {} for i in range(len(sizes))]
        return [self.make(size, inputs, **more) for size, more in zip(sizes, options, strict=True)]
