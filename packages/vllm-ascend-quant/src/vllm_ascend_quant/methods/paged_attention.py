"""vLLM's attention on CPU over pages of 8 bits: the scheme of the layer writes and reads them."""

from typing import Any

from torch import Tensor, nn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from quant_core import AscendAttentionScheme, AttentionBatch, LimitError, Pages
from vllm_ascend_quant import compat


class AscendCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's, but for what is computed."""

    #: The cache is written by itself, before. In vLLM 0.23 attention on CPU does both at once.
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_impl_cls() -> "type[AscendCPUAttentionImpl]":
        """Ours."""
        return AscendCPUAttentionImpl


class AscendCPUAttentionImpl(CPUAttentionBackendImpl):
    """Attention by a scheme.

    Attributes:
        scheme: of the layer whose cache it is.
        scales: the module that holds what the scheme has processed.

    """

    scheme: AscendAttentionScheme
    scales: nn.Module

    @classmethod
    def instead_of(
        cls, impl: CPUAttentionBackendImpl, scheme: AscendAttentionScheme, scales: nn.Module
    ) -> "AscendCPUAttentionImpl":
        """An implementation with the settings of the one that vLLM made."""
        ours: AscendCPUAttentionImpl = object.__new__(cls)
        vars(ours).update(vars(impl))
        ours.scheme, ours.scales = scheme, scales
        return ours

    def do_kv_cache_update(
        self, layer: nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Quantise the step's keys and values into their pages."""
        count = slot_mapping.shape[0]  # without what pads a batch
        self.scheme.write(self.scales, key[:count], value[:count], _pages(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens over the cache; arguments as vLLM's.

        Raises:
            LimitError: if only some of the requests are causal.

        """
        if attn_metadata is None:  # vLLM measures memory
            return output
        if compat.causal_by_request(attn_metadata):
            raise LimitError(
                "a quantised cache serves steps whose requests are all causal or all not",
                found="requests of both kinds, as diffusion models make them",
                todo="serve this model from a checkpoint whose cache is float",
            )
        count = attn_metadata.num_actual_tokens
        batch = AttentionBatch(
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.scale,
            attn_metadata.causal,
            compat.attention_window(self),
            self.logits_soft_cap,
            self.sinks,
            self.alibi_slopes,  # type: ignore[arg-type]  # vLLM has made a tensor of them
        )
        self.scheme.attend(self.scales, query[:count], _pages(kv_cache), batch, output[:count])
        return output


def _pages(kv_cache: Tensor) -> Pages:
    """vLLM's [pages, heads, tokens, 2 · size], of which the first half of a head's memory holds its keys."""
    blocks, heads, _, width = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, -1, width // 2).chunk(2, dim=2)
    return Pages(keys, values)
