"""Quantised key/value caches: keys and values are kept in pages of 8 bits, and attended to as they lie there."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from quant_core.errors import Finding, LoadError
from quant_core.schemes.base import Scheme
from quant_core.schemes.context import AttentionContext, LayerContext
from quant_core.schemes.params import Param, finite, float_values, positive, replace_parameter, zero
from quant_core.stored import WeightForm


class Pages(NamedTuple):
    """The cache of one layer.

    Attributes:
        keys: [pages, key/value heads, tokens of a page, head size], with any strides.
        values: the same of values, whose heads may have another size.

    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """The requests of one step, and how their tokens see each other.

    Attributes:
        block_table: int32 [requests, pages], the pages of each request in the order of its tokens.
        query_start: int32 [requests + 1], where the tokens of each request begin among those of the step.
        seq_lens: int32 [requests], tokens of each request with those of the step, all of them in the cache.
        scale: what the products of queries and keys are multiplied by.
        causal: whether a token sees only itself and what is before it.
        window: how many tokens before itself a token sees; -1 for all.
        softcap: the products are bent to ± this; 0 for not at all.
        sinks: float [query heads], what is added to each softmax's sum as the exponent of a product; None for nothing.
        alibi: float32 [query heads], slopes of a bias that grows with the distance; None for nothing.

    """

    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    scale: float
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi: Tensor | None = None


class AscendAttentionScheme(Scheme):
    """A quantised key/value cache.

    An engine writes and attends apart. What is stored for a layer is small, so every rank loads it whole and the scheme
    takes its own heads' part.

    Attributes:
        stores: how keys and values are kept where a format does not say otherwise.
        strategies: what may share a scale.
        cache_dtype: what a page holds.

    """

    stores: ClassVar[WeightForm]
    strategies: ClassVar[tuple[str, ...]] = ()
    cache_dtype: ClassVar[torch.dtype]
    context: AttentionContext

    @abstractmethod
    def params(self) -> dict[str, Param]:
        """What is stored for the layer, by canonical suffix."""

    def problems(self) -> Iterator[Finding]:
        """What the files hold otherwise than the scheme loads it; see `verify.py` for linear layers."""
        yield from ()

    @abstractmethod
    def write(self, layer: nn.Module, key: Tensor, value: Tensor, pages: Pages, slots: Tensor) -> None:
        """Quantise keys and values [tokens, key/value heads, head size] into the cache.

        Args:
            layer: holds the processed parameters.
            key: in the model's dtype.
            value: in the model's dtype.
            pages: of the layer.
            slots: int64 [tokens], the place of each token: its page times the tokens of a page, and where in it;
                negative for tokens that are not kept.

        """

    @abstractmethod
    def attend(self, layer: nn.Module, query: Tensor, pages: Pages, batch: AttentionBatch, out: Tensor) -> None:
        """Attention over the cache.

        Args:
            layer: holds the processed parameters.
            query: [tokens, query heads, head size] in the model's dtype.
            pages: of the layer.
            batch: the requests.
            out: [tokens, query heads, head size of values], which is filled.

        """

    def apply(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        slots: Tensor,
        batch: AttentionBatch,
        out: Tensor,
    ) -> Tensor:
        """Both at once, for engines that do not call them apart; arguments as theirs."""
        self.write(layer, key, value, pages, slots)
        self.attend(layer, query, pages, batch, out)
        return out


class QuantisedPages(AscendAttentionScheme):
    """Keys and values as (q - offset) · scale, with stored scales of channels, of heads or of all.

    Stored, for keys and values of n heads of size d over all ranks:
        k_scale, v_scale: float [n · d], of heads float [n, 1, 1] or as many, of all [1] or ()
        k_offset, v_offset: a number for each scale, where they are not symmetric

    Run time, for the heads of this rank:
        k_scale, v_scale: float32 [n, d]
        k_offset, v_offset: float32 [n, d], unless they are symmetric
    """

    strategies = ("channel", "head", "tensor")

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """The device's reasons, and those of the form that is stated."""
        assert isinstance(context, AttentionContext)
        stated = context.form.weight or cls.stores
        reasons = super().can_serve(context)
        if context.sizes.latent:
            reasons.append(f"{cls.__name__} keeps keys and values, and latent attention (MLA) has neither")
        if (stated.type, stated.num_bits) != (cls.stores.type, cls.stores.num_bits):
            reasons.append(f"{cls.__name__} has no {stated.type}{stated.num_bits} cache, which the format states")
        if stated.strategy not in cls.strategies:
            reasons.append(f"{cls.__name__} has no scales per {stated.strategy}, which the format states")
        return reasons

    @property
    def kept(self) -> WeightForm:
        """How keys and values are kept."""
        return self.context.form.weight or self.stores

    def params(self) -> dict[str, Param]:
        """Scales, and offsets where they are stored."""
        form, sizes = self.context.form, self.context.sizes
        heads = {"k": sizes.head_size, "v": sizes.value_head_size}
        declared: dict[str, Param] = {}
        for part, size in heads.items():
            usual = {"channel": (sizes.num_kv_heads * size,), "head": (sizes.num_kv_heads, 1, 1)}
            shape = form.shape(f"{part}_scale", usual.get(self.kept.strategy, (1,)))
            declared[f"{part}_scale"] = Param(shape, form.float_dtype(f"{part}_scale"), check=positive, dummy=1.0)
            if form.has(f"{part}_offset", default=not self.kept.symmetric):
                dtype = form.dtype(f"{part}_offset", torch.float32)
                check = zero if self.kept.symmetric else finite
                declared[f"{part}_offset"] = Param(shape, dtype, check=check, dummy=0.0)
        return declared

    def problems(self) -> Iterator[Finding]:
        """Scales that are absent, or of another length than the heads of the model."""
        sizes = self.context.sizes
        heads = {"k": sizes.head_size, "v": sizes.value_head_size}
        for name in self.params():
            size = heads[name[0]]
            counts = {"channel": sizes.num_kv_heads * size, "head": sizes.num_kv_heads, "tensor": 1}
            meaning = f"per {self.kept.strategy} of {sizes.num_kv_heads} heads of {size}"
            yield from misfit(self.context, name, counts[self.kept.strategy], meaning)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """One float32 number for each channel of the heads on this rank."""
        sizes = self.context.sizes
        mine = slice(sizes.first_kv_head, sizes.first_kv_head + sizes.local_heads[1])
        for name in self.params():
            size = sizes.value_head_size if name.startswith("v") else sizes.head_size
            values = float_values(layer.get_parameter(name).data).reshape(-1, 1)
            if self.kept.strategy == "channel":
                values = values.view(sizes.num_kv_heads, size)
            values = values.expand(sizes.num_kv_heads, size)
            replace_parameter(layer, name, values[mine].clone())
        if self.kept.symmetric:
            for name in [name for name in self.params() if name.endswith("_offset")]:
                delattr(layer, name)

    def write(self, layer: nn.Module, key: Tensor, value: Tensor, pages: Pages, slots: Tensor) -> None:
        """One operator."""
        k_scale, k_offset, v_scale, v_offset = _numbers(layer)
        torch.ops.quant_core.quantize_to_pages(
            key, value, pages.keys, pages.values, k_scale, k_offset, v_scale, v_offset, slots
        )

    def attend(self, layer: nn.Module, query: Tensor, pages: Pages, batch: AttentionBatch, out: Tensor) -> None:
        """One operator."""
        torch.ops.quant_core.attend_pages(
            query,
            pages.keys,
            pages.values,
            *_numbers(layer),
            batch.block_table,
            batch.query_start,
            batch.seq_lens,
            batch.scale,
            batch.causal,
            batch.window,
            batch.softcap,
            batch.sinks,
            batch.alibi,
            out,
        )


def misfit(context: AttentionContext, name: str, count: int, meaning: str) -> Iterator[Finding]:
    """What is wrong with a stored tensor that must have so many values; nothing while there are no files."""
    tensor = context.form.tensors.get(name)
    if not context.form or (tensor is not None and math.prod(tensor.shape) == count):
        return
    found = f"{context.form.name_of(name)} is absent"
    if tensor is not None:
        found = f"{tensor.name} in {tensor.file} is {list(tensor.shape)}"
    yield Finding(
        f"{context.name}: the files do not hold what a quantised cache needs",
        found=found,
        expected=f"{count} values, {meaning}",
        todo="check that config.json and weights belong together; otherwise quantise the model again",
        layer=context.name,
        tensor=context.form.name_of(name),
        error=LoadError,
    )


def _numbers(layer: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    return layer.k_scale, getattr(layer, "k_offset", None), layer.v_scale, getattr(layer, "v_offset", None)  # type: ignore[return-value]
