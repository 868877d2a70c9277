"""Biases of linear layers that the architecture has without.

msModelSlim's anti-outlier methods (m1, m2, m4) shift what a norm gives out (norms.py), and the layers behind it take
the shift back: W(x + shift) + b, b = -W shift. Static types hold b inside their integers; beside all others, float ones
too, it is stored as a `.bias` for which vLLM makes no parameter.
"""

from typing import cast

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.served_model import ServedModel


def add_linear_biases(model: nn.Module, served: ServedModel) -> bool:
    """Give each linear layer a bias for which the checkpoint stores one; whether there was any.

    Layers that could not use it are left without, which `check_biases` (loading/checking.py) reports.
    """
    unused = set(compat.layers_read_back(model))  # latent attention multiplies them into others by their weight alone
    found = False
    for path, quant in served.layers.items():
        layer = model.get_submodule(path)
        stored = any(module in served.modules and served.modules[module].has("bias") for module in quant.modules)
        if stored and isinstance(layer, LinearBase) and layer not in unused and _would_add(layer):
            size = sum(cast(list[int], layer.output_partition_sizes))
            bias = torch.empty(size, dtype=layer.params_dtype, device=next(layer.parameters()).device)
            layer.bias = nn.Parameter(bias, requires_grad=False)
            set_weight_attrs(layer.bias, {"output_dim": 0, "weight_loader": layer.weight_loader})
            layer.has_bias = True
            found = True
    return found


def _would_add(layer: LinearBase) -> bool:
    """Whether a layer without a bias would add one to its result."""
    if getattr(layer, "bias", None) is not None or layer.skip_bias_add:
        return False
    method = layer.quant_method
    if isinstance(method, AscendLinearMethod) and method.quant_method.folds_bias:
        return False
    # Nor does vLLM allow a bias here: the sum over the ranks is made elsewhere.
    return not isinstance(layer, RowParallelLinear) or layer.reduce_results
