"""Biases of RMS norms, which msModelSlim's older anti-outlier methods (m1, m2, m4) leave in a checkpoint.

They shift what a norm gives out before it is quantised; the linear layers behind it take the shift back in their own
biases. vLLM's RMS norms have none, and its loaders drop such a tensor without a word.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from vllm_ascend_quant.served_model import ServedModel


class BiasedNorm:
    """Put before a norm's class: adds `bias` to what it normalised, and leaves the residual alone."""

    bias: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's own result, shifted."""
        found = super().forward(*args, **kwargs)  # type: ignore[misc]
        return (found[0] + self.bias, *found[1:]) if isinstance(found, tuple) else found + self.bias


def add_norm_biases(model: nn.Module, served: ServedModel) -> bool:
    """Give each RMS norm a bias for which the checkpoint stores one; whether there was any."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = False
    for name, form in served.modules.items():
        for path in served.paths.paths_of(name) if form.has("bias") else ():
            norm = modules.get(path)
            if isinstance(norm, (RMSNorm, GemmaRMSNorm)) and not isinstance(norm, BiasedNorm):
                weight = norm.weight.data
                norm.register_parameter("bias", nn.Parameter(torch.zeros_like(weight), requires_grad=False))
                # By its class, since compiled code looks there; what else the norm is stays as it was.
                kind = type(norm)
                norm.__class__ = type(f"Biased{kind.__name__}", (BiasedNorm, kind), {})
                found = True
    return found
