"""W4A16_NVFP4: FP4 weights in groups of 16 with E4M3 scales, activations in the model's dtype."""

import torch

from quant_core.schemes.dequantised import DequantisedLinearScheme
from quant_core.schemes.registry import register_scheme
from quant_core.storage.nvfp4 import GROUP
from quant_core.stored import Packing, WeightForm

#: How NVFP4 weights are stored.
NVFP4 = WeightForm(
    num_bits=4,
    type="float",
    strategy="group",
    group_size=GROUP,
    packing=Packing(axis=1),
    scale_dtype=torch.float8_e4m3fn,
    outer="tensor",
)


@register_scheme("W4A16_NVFP4", "linear")
class AscendW4A16NVFP4LinearMethod(DequantisedLinearScheme):
    """y = x (q · weight_scale / weight_global_scale)ᵀ + bias.

    Run time:
        weight: model dtype [out, in]
    """

    granularity = ("groups of 16",)
    stores = NVFP4
    strategies = ("group",)
