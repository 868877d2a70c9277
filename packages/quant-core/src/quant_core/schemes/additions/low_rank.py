"""The low-rank part that `…_SVD` types keep in float beside a quantised weight."""

import torch
from torch import Tensor, nn

from quant_core.schemes.additions.base import Addition
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import Param, finite, tensor_of


class LowRank(Addition):
    """y' = y + (x · svd_lowrank_l1ᵀ) · svd_lowrank_l2ᵀ, with l1 [rank, in] and l2 [out, rank]."""

    name = "low_rank"
    suffixes = ("svd_lowrank_l1", "svd_lowrank_l2")

    @classmethod
    def can_serve(cls, context: LinearContext) -> list[str]:
        """Two factors of one rank."""
        first, second = (context.form.shape(suffix, ()) for suffix in cls.suffixes)
        if not all(context.form.has(suffix) for suffix in cls.suffixes):
            return []  # what is absent is said with its name, like any other tensor
        if len(first) == 2 and len(second) == 2 and first[0] == second[1]:
            return []
        return [f"svd_lowrank_l1 {list(first)} and svd_lowrank_l2 {list(second)} are not [rank, in] and [out, rank]"]

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """Both factors; those of fused members lie one after the other."""
        form = self.context.form
        shape = form.shape("svd_lowrank_l1", ())
        rank = shape[0] if len(shape) == 2 else 1
        first, second = (form.float_dtype(suffix) for suffix in self.suffixes)
        return {
            "svd_lowrank_l1": Param((rank, input_size), first, input_dim=1, check=finite),
            "svd_lowrank_l2": Param((output_size, rank), second, output_dim=0, check=finite),
        }

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """On a row-parallel layer each rank adds the part of its input features; the sum over ranks is whole."""
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ tensor_of(layer, "svd_lowrank_l1").t()
        factors = self._factors(layer)
        parts = [part @ l2.t() for part, l2 in zip(inner.chunk(len(factors), -1), factors, strict=True)]
        return y + torch.cat(parts, dim=-1).view(y.shape)

    def completed(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """W + l2 · l1, member by member."""
        factors = [l2.to(weight.dtype) for l2 in self._factors(layer)]
        inner = tensor_of(layer, "svd_lowrank_l1").to(weight.dtype).chunk(len(factors))
        return weight + torch.cat([l2 @ l1 for l2, l1 in zip(factors, inner, strict=True)])

    def _factors(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """l2 of each member."""
        sizes = [shard.local_output_size for shard in self.context.shards]
        factors: tuple[Tensor, ...] = tensor_of(layer, "svd_lowrank_l2").split(sizes)
        return factors
