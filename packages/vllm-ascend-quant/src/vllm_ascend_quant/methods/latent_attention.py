"""vLLM's latent attention (MLA) on CPU over quantised pages: the scheme of the layer writes and reads them.

vLLM attends to the tokens of a prompt without its cache, by keys and values that it computes from their latents. Here
every query goes to the cache, folded into the latent space, as it does on an NPU.
"""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from quant_core import AscendAttentionScheme, AttentionBatch, Pages


class AscendCPUMLABackend(CPUMLABackend):
    """vLLM's, but for what is computed."""

    @staticmethod
    def get_impl_cls() -> "type[AscendCPUMLAImpl]":
        """Ours."""
        return AscendCPUMLAImpl


class AscendCPUMLAImpl(CPUMLAImpl):
    """Latent attention by a scheme.

    Attributes:
        scheme: of the layer.
        scales: the module that holds what the scheme has processed.
        dtype: the model's, in which the rotary part is kept.

    """

    scheme: AscendAttentionScheme
    scales: nn.Module
    dtype: torch.dtype
    _layer: Callable[[], Any]

    @classmethod
    def instead_of(
        cls, layer: Any, scheme: AscendAttentionScheme, scales: nn.Module, dtype: torch.dtype
    ) -> "AscendCPUMLAImpl":
        """An implementation with the settings of the one that vLLM made for a layer."""
        ours: AscendCPUMLAImpl = object.__new__(cls)
        vars(ours).update(vars(layer.impl))
        ours.scheme, ours.scales, ours.dtype = scheme, scales, dtype
        ours._layer = weakref.ref(layer)  # which holds this
        return ours

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Quantise the step's latents into their pages; arguments as vLLM's."""
        if kv_cache.numel():
            slots = slot_mapping.flatten().to(torch.long)
            count = len(slots)
            self.scheme.write(self.scales, kv_c_normed[:count], k_pe.flatten(1)[:count], self._pages(kv_cache), slots)

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """The tokens of prompts; arguments as vLLM's."""
        layer, prefill = self._layer(), attn_metadata.prefill
        assert layer is not None, "its own method is running"
        nope, rotary = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        folded = torch.bmm(nope.transpose(0, 1), layer.W_UK_T).transpose(0, 1)
        starts = prefill.query_start_loc
        batch = AttentionBatch(prefill.block_table, starts, starts[1:] - starts[:-1], self.scale)
        latent = self._attend(torch.cat([folded, rotary], dim=-1), kv_c_and_k_pe_cache, batch)
        output.copy_(torch.bmm(latent.transpose(0, 1), layer.W_UV).transpose(0, 1).flatten(1).view(output.shape))

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One token of each request; arguments as vLLM's."""
        query, decode = torch.cat(q, dim=-1) if isinstance(q, tuple) else q, attn_metadata.decode
        starts = torch.arange(len(decode.seq_lens) + 1, dtype=torch.int32)
        batch = AttentionBatch(decode.block_table, starts, decode.seq_lens, self.scale)
        return self._attend(query, kv_c_and_k_pe_cache, batch), None

    def _attend(self, query: Tensor, kv_cache: Tensor, batch: AttentionBatch) -> Tensor:
        out = query.new_empty(*query.shape[:-1], self.kv_lora_rank)
        self.scheme.attend(self.scales, query, self._pages(kv_cache), batch, out)
        return out

    def _pages(self, kv_cache: Tensor) -> Pages:
        """vLLM's bytes [pages, tokens, bytes of one]: codes of the latent, then the rotary part."""
        codes, rest = kv_cache.unsqueeze(1).split([self.kv_lora_rank, kv_cache.shape[-1] - self.kv_lora_rank], dim=-1)
        return Pages(codes.view(self.scheme.cache_dtype), rest.view(self.dtype))


def keep_bytes(layer: Any, dtype: torch.dtype) -> None:
    """Let a layer ask for a cache of one byte for each feature of the latent, and the rotary part as it is."""
    usual = layer.get_kv_cache_spec
    width = layer.kv_lora_rank + layer.qk_rope_head_dim * dtype.itemsize

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        return dataclasses.replace(usual(vllm_config), head_size=width, dtype=torch.int8)

    layer.get_kv_cache_spec = get_kv_cache_spec
