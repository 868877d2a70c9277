"""Biases of RMS norms, which msModelSlim's older anti-outlier methods (m1, m2, m4) leave in a checkpoint.

They shift what a norm gives out before it is quantised; the linear layers behind it take the shift back in their own
biases. vLLM's RMS norms have none, and its loaders drop such a tensor without a word.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from vllm_ascend_quant.served_model import ServedModel


def add_norm_biases(model: nn.Module, served: ServedModel) -> bool:
    """Give each RMS norm a bias for which the checkpoint stores one; whether there was any."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = False
    for name, form in served.modules.items():
        for path in served.paths.paths_of(name) if form.has("bias") else ():
            norm = modules.get(path)
            if isinstance(norm, (RMSNorm, GemmaRMSNorm)) and getattr(norm, "bias", None) is None:
                bias = torch.zeros_like(norm.weight.data)
                norm.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
                norm.register_forward_hook(_shift)
                found = True
    return found


def _shift(norm: nn.Module, inputs: Any, found: Any) -> Any:
    """What the norm gives out, shifted, and the residual as it is.

    A hook and no norm of another class: whichever of its implementations vLLM has chosen for the platform has run, and
    compiled code follows hooks that are there when it is made.
    """
    return (found[0] + norm.bias, *found[1:]) if isinstance(found, tuple) else found + norm.bias
