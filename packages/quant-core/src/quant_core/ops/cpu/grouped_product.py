"""The product of one expert: that of a linear layer with the same operands, by the same kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.ops.cpu.groups import Group, of_rows
from quant_core.ops.cpu.int4 import int8_weight
from quant_core.ops.cpu.int8_gemm import int8_gemm
from quant_core.ops.cpu.matmul import npu_quant_matmul, scaled
from quant_core.ops.cpu.packed import packed_product
from quant_core.ops.cpu.w4a8 import sum_of_groups
from quant_core.ops.cpu.weight_only import npu_weight_quant_batchmatmul
from quant_core.ops.dtypes import FLOAT8_E8M0, number_of

#: An operand of all experts: one tensor for each, or a single one with a leading axis of experts.
Operand = Sequence[Tensor] | None

#: Dtypes of rows that carry FP8 or FP4.
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)


@dataclass(frozen=True)
class Experts:
    """What the rows of an expert are multiplied with.

    Attributes:
        weight: [k, n] each, in every form that the linear operators take.
        bias: [n] each.
        scale: of products of codes: [n] each, [groups, n], or MX exponents [ceil(k / 64), n, 2].
        antiquant_scale: of products of floating rows: [n] each, or [groups, n].
        antiquant_offset: as antiquant_scale.
        target: dtype of the result.
        x_dtype: what the rows carry, if not what their dtype says.
        weight_dtype: what the weights carry.
        scale_dtype: what the scales carry.
        per_token_scale_dtype: what the scales of rows carry.

    """

    weight: Sequence[Tensor]
    target: torch.dtype
    bias: Operand = None
    scale: Operand = None
    antiquant_scale: Operand = None
    antiquant_offset: Operand = None
    x_dtype: int | None = None
    weight_dtype: int | None = None
    scale_dtype: int | None = None
    per_token_scale_dtype: int | None = None

    def __len__(self) -> int:
        """Number of experts."""
        return len(self.weight[0]) if self._stacked else len(self.weight)

    @property
    def _stacked(self) -> bool:
        return len(self.weight) == 1 and self.weight[0].dim() == 3

    def of(self, operand: Operand, expert: int) -> Tensor | None:
        """An operand of one expert."""
        if not operand:
            return None
        single = len(operand) == 1 and (self._stacked or len(self.weight) > 1)
        return operand[0][expert] if single else operand[expert]

    def multiplies_plainly(self, x: Tensor) -> bool:
        """Whether rows and weights are int8, with a floating scale for each column."""
        scale = self.of(self.scale, 0)
        plain = scale is not None and scale.is_floating_point() and scale.numel() == scale.shape[-1]
        return plain and x.dtype == self.weight[0].dtype == torch.int8 and not self.bias

    def sums(self, batch: Sequence[Group], x: Tensor) -> Tensor:
        """The unscaled products of neighbouring groups that are multiplied plainly: int32, or float32 of packed ones.

        Args:
            batch: the groups.
            x: the rows of all groups.

        """
        found = []
        for expert, rows in batch:
            weight = self.of(self.weight, expert)
            assert weight is not None
            found.append(packed_product(x[rows], weight) if weight.is_mkldnn else int8_gemm(x[rows], weight))
        return found[0] if len(found) == 1 else torch.cat(found)

    def products(self, batch: Sequence[Group], x: Tensor, token_scale: Tensor | None) -> Tensor:
        """The products of neighbouring groups, one below the other.

        Args:
            batch: the groups; several only if they are multiplied plainly, as then they are scaled together.
            x: the rows of all groups.
            token_scale: of all rows.

        """
        rows = slice(batch[0].rows.start, batch[-1].rows.stop)
        tokens = None if token_scale is None else token_scale[rows]
        if len(batch) == 1:
            return self.product(batch[0].expert, x[rows], tokens)
        columns = of_rows(batch, lambda expert: self.of(self.scale, expert))
        assert columns is not None
        return scaled(self.sums(batch, x), columns, tokens, None, self.target)

    def product(self, expert: int, x: Tensor, token_scale: Tensor | None) -> Tensor:
        """Rows of an expert times its weight, with all that belongs to it.

        Args:
            expert: which one.
            x: its rows [m, k].
            token_scale: of its rows: [m], or MX exponents [m, ceil(k / 64), 2].

        Returns:
            [m, n] in the target dtype.

        Raises:
            NotImplementedError: for operands that the CPU kernels do not have.
            ValueError: for operands that do not fit together.

        """
        weight, bias = self.of(self.weight, expert), self.of(self.bias, expert)
        assert weight is not None
        if x.dtype in (torch.int8, torch.int32):
            return self._integer(expert, x, weight, bias, token_scale)
        if x.dtype in _CODES:
            return self._codes(expert, x, weight, bias, token_scale)
        if weight.dtype in (torch.int8, torch.int32):
            return self._weight_only(expert, x, weight, bias)
        if weight.dtype != x.dtype or not x.is_floating_point():
            raise NotImplementedError(f"npu_grouped_matmul: the CPU kernel has no {x.dtype} x {weight.dtype}")
        product = (x @ weight).to(torch.float32)
        return (product if bias is None else product.add_(bias)).to(self.target)

    def _integer(
        self, expert: int, x: Tensor, weight: Tensor, bias: Tensor | None, token_scale: Tensor | None
    ) -> Tensor:
        scale = self.of(self.scale, expert)
        if scale is not None and scale.dim() == 2 and len(scale) == 1 and weight.dtype != torch.int32:
            scale = scale[0]
        if scale is None:
            if self.target != torch.int32:
                raise ValueError(f"npu_grouped_matmul: {x.dtype} x {weight.dtype} to {self.target} needs a scale")
            scale = torch.ones(1, dtype=torch.float32, device="cpu")
        if x.dtype == torch.int8 and (weight.dtype == torch.int32 or scale.dim() == 2):
            return self._groups(x, weight, scale, bias, token_scale)
        return npu_quant_matmul(
            x, weight, scale, pertoken_scale=token_scale, bias=bias, output_dtype=number_of(self.target)
        )

    def _groups(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, token_scale: Tensor | None
    ) -> Tensor:
        """int8 x int4, the device makes it (x - 8) @ w · scale + bias; ours: int8 x int8 with scales in groups."""
        shift = 8 if weight.dtype == torch.int32 else 0
        if scale.dim() != 2 or scale.is_floating_point() == bool(shift) or x.shape[1] % len(scale):
            raise ValueError(
                f"npu_grouped_matmul: the scale of int8 {list(x.shape)} x {weight.dtype} {list(weight.shape)} is "
                f"{scale.dtype} {list(scale.shape)}, expected {'int64' if shift else 'float32'} [groups, n]"
            )
        added = torch.zeros(1, dtype=torch.float32, device="cpu") if bias is None else bias
        if token_scale is None or (shift and bias is None):
            raise ValueError(
                "npu_grouped_matmul: int8 x int4 needs per_token_scale, and the bias 8 Σ w · scale: the device "
                "multiplies x - 8"
            )
        if shift:
            # The low half of each int64 is a float32. npu_quant_matmul shortens it to 19 bits; here nobody says so.
            weight, scale = int8_weight(weight, x.shape[1]), scale.to(torch.int32).view(torch.float32)
            return ((sum_of_groups(x, weight, scale, shift) + added) * token_scale.reshape(-1, 1)).to(self.target)
        return (sum_of_groups(x, weight, scale.to(torch.float32)) * token_scale.reshape(-1, 1) + added).to(self.target)

    def _codes(self, expert: int, x: Tensor, weight: Tensor, bias: Tensor | None, token_scale: Tensor | None) -> Tensor:
        scale, scale_dtype = self.of(self.scale, expert), self.scale_dtype
        if scale is None:  # so FP4 weights are given beside FP8 rows
            scale, scale_dtype = self.of(self.antiquant_scale, expert), FLOAT8_E8M0
        if scale is None:
            raise ValueError(f"npu_grouped_matmul: {x.dtype} x {weight.dtype} needs a scale")
        return npu_quant_matmul(
            x,
            weight,
            scale,
            pertoken_scale=token_scale,
            bias=bias,
            output_dtype=number_of(self.target),
            x1_dtype=self.x_dtype,
            x2_dtype=self.weight_dtype,
            pertoken_scale_dtype=self.per_token_scale_dtype,
            scale_dtype=scale_dtype,
        )

    def _weight_only(self, expert: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, offset = self.of(self.antiquant_scale, expert), self.of(self.antiquant_offset, expert)
        if scale is None:
            raise ValueError(f"npu_grouped_matmul: {x.dtype} x {weight.dtype} needs an antiquant_scale")
        groups = len(scale) if scale.dim() == 2 else 1
        size = -(-x.shape[1] // groups) if groups > 1 else 0
        y = npu_weight_quant_batchmatmul(x, weight, scale, offset, bias=bias, antiquant_group_size=size)
        return y.to(self.target)
