"""What quant_core computes, for a comparison of two processes."""

import torch
from linear_forms import LAYERS, forms
from torch import Tensor


def results() -> dict[str, list[Tensor]]:
    """The results of all sample calls, and of all linear schemes in all forms, dtypes and kinds of layer."""
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    import attention_calls
    import expert_calls
    import operator_calls  # all draw their arguments

    found = {}
    for label, (name, arguments, options) in (
        operator_calls.CALLS | expert_calls.CALLS | attention_calls.CALLS
    ).items():
        result = operator_calls.operator_of(name)(*arguments, **options)
        found[label] = [result] if isinstance(result, Tensor) else list(result or ())
    for label, form in forms().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layer, options in LAYERS.items():
                found[f"{label}, {dtype}, {layer}"] = form.compute(dtype, **options)
    return found
