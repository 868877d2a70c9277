"""Deciding the caches of attention layers: which of them are quantised, and by which tensors of the checkpoint."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import QKVParallelLinear

from quant_core import AscendAttentionScheme, AttentionSizes, LayerQuant, LayerResolutionError, LimitError
from quant_core.errors import listing
from vllm_ascend_quant import ascend_platform, compat
from vllm_ascend_quant.methods.cache import NAME, AscendKVCacheMethod, CacheScales
from vllm_ascend_quant.served_model import ServedModel


def decide_caches(model: nn.Module, served: ServedModel, vllm_config: Any) -> bool:
    """Give each attention layer whose cache the checkpoint quantises the pages and the arithmetic for it.

    Returns:
        whether there is any.

    Raises:
        QuantError: if a cache belongs to no layer, or cannot be served.

    """
    caches = served.format.caches
    if not caches:
        return False
    layers = {path: module for path, module in model.named_modules() if compat.is_attention(module)}
    quantised: dict[str, nn.Module] = {}
    for module, quant in caches.items():
        path = _path_of(module, layers, served)
        if path is None:
            continue
        _take_over(path, model, quant, served, vllm_config)
        served.caches[path] = quant
        served.cache_tensors |= {
            tensor.name: f"{path}.{NAME}.{suffix}" for suffix, tensor in quant.stored[0].tensors.items()
        }
        quantised[getattr(layers[path], "layer_name", path)] = layers[path]
    for layer in layers.values():
        target = quantised.get(getattr(layer, "kv_sharing_target_layer_name", None) or "")
        if target is None:
            continue
        if ascend_platform.is_active():
            _hand_over(layer, getattr(target, NAME).quant_method.quant)  # refuses it
        else:
            _compute_with(layer, target)  # it reads the target's pages, and writes none
    _refuse_float_targets(served, layers, quantised)
    return True


def _refuse_float_targets(served: ServedModel, layers: dict[str, nn.Module], quantised: dict[str, nn.Module]) -> None:
    """See that no layer has scales that reads what another one writes in float.

    Raises:
        LayerResolutionError: names both.

    """
    for path, quant in served.caches.items():
        target = getattr(layers[path], "kv_sharing_target_layer_name", None)
        if target is not None and target not in quantised:
            raise LayerResolutionError(
                f"{path}: it shares the cache of {target}, and only one of the two is quantised",
                found=f"{listing(tensor.name for tensor in quant.stored[0].tensors.values())}, and none for {target}",
                expected="scales for the layer that writes the cache",
                todo="quantise the caches of both layers, or of none",
                layer=path,
            )


def _path_of(module: str, layers: dict[str, nn.Module], served: ServedModel) -> str | None:
    """The attention layer that a checkpoint's attention module is loaded into; None if another rank has it.

    It stands below the module that holds the projections: their places are known.
    """
    below = [name for name in served.modules if name.startswith(f"{module}.")] or [module]
    above = {path.rpartition(".")[0] for name in below for path in served.paths.paths_of(name) if "." in path}
    found = {path for path in layers for parent in above if path.startswith(f"{parent}.")}
    if len(found) == 1:
        return found.pop()
    if not found and any(name in served.elsewhere for name in below):
        return None
    raise LayerResolutionError(
        f"{module}: the checkpoint has a quantised cache, and the model {'several' if found else 'no'} attention "
        f"layers for it",
        found=listing(sorted(found)) if found else listing(layers),
        where=str(served.format.folder.path),
        todo="check that config.json describes the model that was quantised; if it does, report the architecture",
        layer=module,
    )


def _take_over(path: str, model: nn.Module, quant: LayerQuant, served: ServedModel, vllm_config: Any) -> None:
    layer: Any = model.get_submodule(path)
    latent = compat.has_cpu_latent_attention(layer)
    elsewhere = ascend_platform.is_active()
    if elsewhere:
        deliver = _hand_over(layer, quant)
    elif not latent and not compat.has_cpu_attention(layer):
        raise LimitError(
            f"{path}: a quantised cache of the type {quant.quant_type} is not served for this kind of attention",
            found=f"{type(layer).__name__} with {type(layer.impl).__name__}",
            expected="ordinary or latent attention of vLLM's CPU build",
            todo="serve a checkpoint without a quantised cache",
            layer=path,
        )
    skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
    if skipped:
        raise LimitError(
            f"{path}: --kv-cache-dtype-skip-layers {listing(skipped)} cannot be had with a checkpoint whose cache is "
            "quantised by stored scales",
            todo="leave the option out: which layers are quantised is said by the checkpoint",
            layer=path,
        )
    if not latent and layer.head_size != layer.head_size_v:
        raise LimitError(f"{path}: keys of {layer.head_size} and values of {layer.head_size_v} features share no page")
    if latent:
        sizes = _latent_sizes(layer, vllm_config)
    else:
        sizes = _sizes(layer, quant, vllm_config, _heads_beside(model, path))
    dtype = vllm_config.model_config.dtype
    method = AscendKVCacheMethod(served.format, path, quant, sizes, dtype, served.made_up)
    layer.add_module(NAME, CacheScales(method))
    if elsewhere:
        method.deliver = deliver
    elif latent:
        _compute_latent(layer, dtype)
    else:
        _compute_with(layer, layer)


def _hand_over(layer: Any, quant: LayerQuant) -> Callable[[nn.Module, AscendAttentionScheme], None]:
    """Leave a layer to the platform's attention; what is to get its scales once they are processed."""
    from vllm_ascend_quant.ascend_platform.attention import give_scales, hand_over

    hand_over(layer, quant)
    return functools.partial(give_scales, layer)


def _compute_latent(layer: Any, dtype: torch.dtype) -> None:
    from vllm_ascend_quant.methods.latent_attention import AscendCPUMLABackend, AscendCPUMLAImpl, keep_bytes

    scales = getattr(layer, NAME)
    layer.attn_backend, layer.kv_cache_dtype = AscendCPUMLABackend, "auto"
    layer.impl = AscendCPUMLAImpl.instead_of(layer, scales.quant_method.quant_method, scales, dtype)
    keep_bytes(layer, dtype)


def _compute_with(layer: Any, owner: Any) -> None:
    """Let a layer attend over the pages of the one that owns them."""
    from vllm_ascend_quant.methods.paged_attention import AscendCPUAttentionBackend, AscendCPUAttentionImpl

    scales = getattr(owner, NAME)
    scheme = scales.quant_method.quant_method
    layer.kv_cache_torch_dtype, layer.kv_cache_dtype = scheme.cache_dtype, "auto"
    layer.attn_backend = AscendCPUAttentionBackend
    layer.impl = AscendCPUAttentionImpl.instead_of(layer.impl, scheme, scales)


def _latent_sizes(layer: Any, vllm_config: Any) -> AttentionSizes:
    return AttentionSizes(
        num_heads=layer.num_heads * vllm_config.parallel_config.tensor_parallel_size,
        num_kv_heads=1,
        head_size=layer.kv_lora_rank,
        value_head_size=layer.qk_rope_head_dim,
        local_heads=(layer.num_heads, 1),
        latent=True,
    )


def _sizes(layer: Any, quant: LayerQuant, vllm_config: Any, told: int | None) -> AttentionSizes:
    """Heads over all ranks: a head may be held by several of them.

    Args:
        layer: knows those of this rank.
        quant: its scales tell how many there are, for want of better.
        vllm_config: knows the ranks.
        told: key/value heads by the layer that makes them; None if it does not say.

    """
    parallel = vllm_config.parallel_config
    ranks, rank = parallel.tensor_parallel_size, get_tensor_model_parallel_rank()
    total, stored = told or layer.num_kv_heads * ranks, quant.stored[0]
    per_head = {"channel": layer.head_size, "head": 1}.get(stored.weight.strategy if stored.weight else "")
    if told is None and per_head is not None and layer.num_kv_heads == 1:
        heads = math.prod(stored.shape("k_scale", ())) // per_head
        total = heads if 0 < heads < ranks and ranks % heads == 0 else total
    copies = max(1, layer.num_kv_heads * ranks // total)
    return AttentionSizes(
        num_heads=layer.num_heads * ranks,
        num_kv_heads=total,
        head_size=layer.head_size,
        value_head_size=layer.head_size_v,
        local_heads=(layer.num_heads, layer.num_kv_heads),
        first_kv_head=rank // copies * layer.num_kv_heads,
    )


def _heads_beside(model: nn.Module, path: str) -> int | None:
    """Key/value heads over all ranks, by the layer beside an attention layer that makes keys and values."""
    beside = model.get_submodule(path.rpartition(".")[0]).children()
    told = {layer.total_num_kv_heads for layer in beside if isinstance(layer, QKVParallelLinear)}
    return told.pop() if len(told) == 1 else None
