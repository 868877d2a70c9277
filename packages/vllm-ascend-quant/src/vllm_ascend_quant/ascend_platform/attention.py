"""8-bit caches in vllm-ascend's own attention, which quantises, keeps and reads pages of int8."""

from typing import Any

import torch
from torch import nn
from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl, AscendC8AttentionBackendImpl

from quant_core import AscendAttentionScheme, LayerQuant, LimitError
from vllm_ascend_quant.ascend_platform.runtime import keeps_int8_pages

#: vllm-ascend reads pages in the NPU's layout, whose innermost axis has so many numbers of a byte.
_INNERMOST = 32


def refusal(layer: Any, quant: LayerQuant) -> str | None:
    """Why vllm-ascend cannot serve the quantised cache of an attention layer; None if it can."""
    if type(layer.impl) is not AscendAttentionBackendImpl:
        return f"{type(layer.impl).__name__} keeps no pages of int8 whose scales could be handed over"
    if not keeps_int8_pages(quant):
        return f"vllm-ascend has no {quant.quant_type} cache for keys and values"
    if getattr(layer, "kv_sharing_target_layer_name", None):
        return f"the layer shares the cache of {layer.kv_sharing_target_layer_name}"
    if layer.head_size % _INNERMOST:
        return f"heads of {layer.head_size} features are no multiple of {_INNERMOST}"
    return None


def hand_over(layer: Any, quant: LayerQuant) -> None:
    """Let vllm-ascend's int8 attention compute a layer; its scales come with `give_scales`.

    Raises:
        LimitError: if it cannot.

    """
    reason = refusal(layer, quant)
    if reason is not None:
        raise LimitError(
            f"{layer.layer_name}: vllm-ascend cannot serve this quantised cache",
            found=reason,
            where=str(quant.evidence[0]) if quant.evidence else None,
            todo="serve a checkpoint without a quantised cache, or one whose cache is symmetric int8",
            layer=layer.layer_name,
        )
    layer.kv_cache_torch_dtype, layer.kv_cache_dtype = torch.int8, "auto"
    vars_of_impl = vars(layer.impl)
    layer.impl = object.__new__(AscendC8AttentionBackendImpl)
    vars(layer.impl).update(vars_of_impl)


def give_scales(layer: nn.Module, scales: nn.Module, scheme: AscendAttentionScheme) -> None:
    """Hand over what a scheme has processed, for the heads of this rank, under vllm-ascend's names.

    Its impl takes numbers for exactly its own heads as they are, and would cut others.

    Raises:
        LimitError: if the cache has zero points, which vllm-ascend adds as it writes and leaves out as it reads.

    """
    for part in ("k", "v"):
        offset = getattr(scales, f"{part}_offset", None)
        if offset is not None and bool(offset.any()):
            raise LimitError(
                f"{scheme.context.name}: vllm-ascend cannot serve a cache with zero points",
                found=f"{scheme.context.form.name_of(f'{part}_offset')} that is not zero",
                expected="a symmetric cache: what it adds when it writes, it leaves out when it reads",
                todo="quantise the cache symmetrically, or serve a checkpoint without a quantised cache",
                layer=scheme.context.name,
            )
        scale = scales.get_parameter(f"{part}_scale").data.to(scheme.context.params_dtype).flatten()
        for name, value in (("scale", scale), ("offset", torch.zeros_like(scale))):
            setattr(layer, f"{part}_cache_{name}", nn.Parameter(value, requires_grad=False))
    vars(layer).pop("_c8_scales_prepared", None)  # a reload brings other scales
