"""Float32 values of FP8 and FP4 codes, and of weights that were decoded before."""

import functools

import torch
from torch import Tensor

from quant_core import microscaling as mx


class Decoder:
    """Decodes into memory that it uses again: fresh memory costs more than the conversion."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0, dtype=torch.int32)
        self._floats = torch.empty(0, dtype=torch.float32)

    def __call__(self, codes: Tensor) -> Tensor:
        """Decode a matrix.

        Args:
            codes: FP8 [r, k], FP4 in uint8 [r, k / 2], or values that are no codes: int8 or bfloat16 [r, k].

        Returns:
            float32 [r, k], until the next call.

        """
        rows, columns = codes.shape
        if codes.dtype in (torch.int8, torch.bfloat16):
            return self._memory(codes.numel()).view(rows, columns).copy_(codes)
        codes = codes.contiguous()
        if codes.dtype == torch.uint8:
            return self._looked_up(_fp4_pairs(), codes.view(-1)).view(rows, 2 * columns)
        if codes.numel() % 2 or codes.storage_offset() % 2:
            return codes.to(torch.float32)
        return self._looked_up(_fp8_pairs(codes.dtype), codes.view(-1).view(torch.uint16)).view(rows, columns)

    def _looked_up(self, table: Tensor, numbers: Tensor) -> Tensor:
        """A pair of float32 is looked up as if it were one float64."""
        count = numbers.numel()
        if self._numbers.numel() < count:
            self._numbers = torch.empty(count, dtype=torch.int32)
        floats = self._memory(2 * count)
        torch.index_select(table, 0, self._numbers[:count].copy_(numbers), out=floats.view(torch.float64))
        return floats

    def _memory(self, count: int) -> Tensor:
        if self._floats.numel() < count:
            self._floats = torch.empty(count, dtype=torch.float32)
        return self._floats[:count]


@functools.cache
def _fp4_pairs() -> Tensor:
    """The two values of each byte, as the bits of a float64."""
    return mx.e2m1_values(mx.unpack_e2m1(torch.arange(256, dtype=torch.uint8, device="cpu"))).view(torch.float64)


@functools.cache
def _fp8_pairs(dtype: torch.dtype) -> Tensor:
    """The two values of each two bytes, as the bits of a float64. Half a megabyte, and ten times as fast as torch."""
    numbers = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16)
    return numbers.view(torch.uint8).view(dtype).to(torch.float32).view(torch.float64)
