"""FAKQuant: the latent of multi-head latent attention (MLA) in int8 or FP8, its rotary part in the model's dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quant_core.errors import Finding
from quant_core.schemes.caches import AscendAttentionScheme, AttentionBatch, Pages, misfit
from quant_core.schemes.context import AttentionContext, LayerContext
from quant_core.schemes.params import Param, float_values, positive, replace_parameter, tensor_of, zero
from quant_core.schemes.registry import register_scheme
from quant_core.stored import WeightForm

#: The largest code of a query, whose scale is found for each token and head.
_LARGEST = 127


@register_scheme("FAKQuant", "attention")
@register_scheme("FAQuant", "attention")
class AscendFAKQuantAttentionMethod(AscendAttentionScheme):
    """Scores are q̂ · ĉ + q_rotary · k_rotary, outputs Σ p · ĉ, with ĉ = k_scale · clamp(rint(c / k_scale), -128, 127).

    c is the normalised latent, key and value at once. q is the query folded into the latent space, quantised to int8
    for each token and head: q̂ = s · rint(q / s), s = max|q| / 127. The probabilities p stay float.

    Stored, for n query heads over all ranks:
        k_scale, v_scale: float [1, 1], of the latent, both the same
        q_scale: float [n, 1], which the scale at run time takes the place of
        q_offset, k_offset, v_offset: zero

    Run time:
        k_scale: float32 [1]
    """

    granularity = ("per tensor",)
    checked_against = dict.fromkeys(("FAKQuant", "FAQuant"), ("deepseek-v3/W8A8_FAKQUANT",))
    stores = WeightForm(strategy="tensor")
    strategies = ("tensor",)
    cache_dtype = torch.int8

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """Latent attention alone."""
        assert isinstance(context, AttentionContext)
        reasons = super().can_serve(context)
        if not context.sizes.latent:
            reasons.append("it is for latent attention (MLA), which this layer has not")
        return reasons

    def params(self) -> dict[str, Param]:
        """Scales and offsets of all three, as they are stored."""
        form, heads = self.context.form, {"q": self.context.sizes.num_heads}
        declared = {}
        for part in "qkv":
            scale, offset = f"{part}_scale", f"{part}_offset"
            shape = form.shape(scale, (heads.get(part, 1), 1))
            if part == "k" or form.has(scale):
                declared[scale] = Param(shape, form.float_dtype(scale), check=positive, dummy=1.0)
            if form.has(offset):
                declared[offset] = Param(
                    form.shape(offset, shape), form.dtype(offset, torch.int8), check=zero, dummy=0.0
                )
        return declared

    def problems(self) -> Iterator[Finding]:
        """One scale of the latent."""
        yield from misfit(self.context, "k_scale", 1, "one for the latent of all heads")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The scale of the latent is all that is needed."""
        scale = float_values(layer.get_parameter("k_scale").data).reshape(1)
        for name in self.params():
            delattr(layer, name)
        replace_parameter(layer, "k_scale", scale)

    def write(self, layer: nn.Module, key: Tensor, value: Tensor, pages: Pages, slots: Tensor) -> None:
        """Quantise the latent [tokens, rank], and keep the rotary part [tokens, features] as it is."""
        kept = slots >= 0
        slots, key, value = slots[kept], key[kept], value[kept]
        page, place = slots // pages.keys.shape[2], slots % pages.keys.shape[2]
        codes = (key.to(torch.float32) / tensor_of(layer, "k_scale")).round().clamp(-128, 127)
        pages.keys[page, 0, place] = codes.to(pages.keys.dtype)
        pages.values[page, 0, place] = value.to(pages.values.dtype)

    def attend(self, layer: nn.Module, query: Tensor, pages: Pages, batch: AttentionBatch, out: Tensor) -> None:
        """Request by request: queries [tokens, heads, rank and rotary features] give [tokens, heads, rank]."""
        scale, rank = tensor_of(layer, "k_scale"), pages.keys.shape[-1]
        latent, rotary = query.to(torch.float32).split([rank, query.shape[-1] - rank], dim=-1)
        step = (latent.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        latent = (latent / step).round() * step
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        for request, length in enumerate(lengths):
            tokens = slice(starts[request], starts[request + 1])
            held = batch.block_table[request, : -(-length // pages.keys.shape[2])]
            codes = pages.keys[held, 0].flatten(0, 1)[:length].to(torch.float32)
            turned = pages.values[held, 0].flatten(0, 1)[:length].to(torch.float32)
            scores = (latent[tokens] @ codes.t() * scale + rotary[tokens] @ turned.t()) * batch.scale
            if batch.causal:
                count = tokens.stop - tokens.start
                later = torch.ones(count, length, dtype=torch.bool, device=scores.device).triu(length - count + 1)
                scores = scores.masked_fill(later[:, None], -torch.inf)
            out[tokens] = (scores.softmax(-1) @ codes * scale).to(out.dtype)
