"""Every FP8 and FP4 code has its value, however the codes lie in memory."""

import pytest
import torch
from bits import e2m1

from quant_core.ops.cpu.decode import Decoder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("columns", [1, 2, 64])
def test_every_fp8_code(dtype: torch.dtype, columns: int) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).view(-1, columns)
    for part in (codes, codes[1:], codes[1:2], codes.t()):
        torch.testing.assert_close(Decoder()(part), part.to(torch.float32), rtol=0, atol=0, equal_nan=True)


def test_every_fp4_code() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(4, 64)
    for part in (codes, codes[1:3], codes[:0], codes.t()):
        assert torch.equal(Decoder()(part), e2m1(part))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_values_that_are_no_codes(dtype: torch.dtype) -> None:
    values = torch.arange(-128, 128, dtype=torch.int16).to(dtype).view(4, 64)
    for part in (values, values[1:3], values[:0], values.t()):
        assert torch.equal(Decoder()(part), part.to(torch.float32))


def test_memory_is_used_again_for_what_fits() -> None:
    decode = Decoder()
    large, small = torch.full((4, 64), 0x22, dtype=torch.uint8), torch.full((2, 8), 0x44, dtype=torch.uint8)
    first = decode(large)
    second = decode(small)
    assert second.data_ptr() == first.data_ptr()
    assert second.tolist() == [[2.0] * 16] * 2
    assert decode(large).tolist() == [[1.0] * 128] * 4
