"""npu_format_cast: another layout behind the same values."""

import pytest
import torch

npu = torch.ops.npu

FRACTAL_NZ = 29


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("view", ["contiguous", "transposed", "experts", "empty"])
def test_values_and_strides_stay(dtype: torch.dtype, view: str) -> None:
    """A matmul tells a transposed weight by its strides."""
    plain = (torch.randn(3, 6, 8) * 50).to(dtype)
    tensor = {"contiguous": plain[0], "transposed": plain[0].t(), "experts": plain.mT, "empty": plain[0, :0]}[view]
    got = npu.npu_format_cast(tensor, FRACTAL_NZ)
    assert torch.equal(got, tensor)
    assert (got.dtype, got.stride()) == (tensor.dtype, tensor.stride())


def test_it_is_a_copy() -> None:
    tensor = torch.zeros(4, 4, dtype=torch.int8)
    got = npu.npu_format_cast(tensor.t(), FRACTAL_NZ)
    tensor.fill_(1)
    assert not got.any()


def test_a_slice_of_a_larger_weight_gets_storage_of_its_own() -> None:
    large = torch.randint(-9, 9, (64, 512), dtype=torch.int8)
    got = npu.npu_format_cast(large[:, :8], FRACTAL_NZ)
    assert torch.equal(got, large[:, :8])
    assert got.untyped_storage().nbytes() == 64 * 8


@pytest.mark.parametrize("options", [{"customize_dtype": torch.float8_e4m3fn}, {"input_dtype": 296}])
def test_a_conversion_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="npu_format_cast"):
        npu.npu_format_cast(torch.zeros(4, 4, dtype=torch.uint8), FRACTAL_NZ, **options)


def test_fp4_beside_fp8_keeps_its_bytes() -> None:
    packed = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    got = npu.npu_format_cast(packed, FRACTAL_NZ, customize_dtype=torch.float8_e4m3fn, input_dtype=296)
    assert torch.equal(got, packed)
    packed.fill_(0)
    assert got.any()
