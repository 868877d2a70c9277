"""What quant_core computes, for a comparison of two processes."""

import torch
from linear_forms import LAYERS, forms
from torch import Tensor


def results() -> dict[str, list[Tensor]]:
    """The results of all sample calls, and of all linear schemes in all forms, dtypes and kinds of layer."""
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    from operator_calls import CALLS  # draws its arguments

    found = {}
    for label, (name, arguments, options) in CALLS.items():
        result = getattr(torch.ops.npu, name)(*arguments, **options)
        found[label] = [result] if isinstance(result, Tensor) else list(result)
    for label, form in forms().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layer, options in LAYERS.items():
                found[f"{label}, {dtype}, {layer}"] = form.compute(dtype, **options)
    return found
