"""int4 values in int32, and products of them."""

from typing import Any

import pytest
import torch
from bits import pack_eights, unpack_eights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant_core.ops.cpu import int4_gemm, int8_gemm

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")


def int4(*shape: int) -> Tensor:
    """Random values, -8 among them."""
    return torch.randint(-8, 8, shape, dtype=torch.int32)


def packed_by_definition(row: list[int]) -> list[int]:
    """Value j in bits 4j to 4j + 3, two's complement, as the int32 that has these bits."""
    words = []
    for start in range(0, len(row), 8):
        word = sum((value % 16) << (4 * j) for j, value in enumerate(row[start : start + 8]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@given(st.lists(st.lists(st.integers(-8, 7), min_size=8, max_size=8), min_size=1, max_size=9))
def test_packing_is_the_definition_and_unpacking_its_inverse(groups: list[list[int]]) -> None:
    row = [value for group in groups for value in group]
    values = torch.tensor([row, row[::-1]], dtype=torch.int32)
    got = npu.npu_convert_weight_to_int4pack(values)
    assert got.dtype == torch.int32
    assert got.tolist() == [packed_by_definition(row), packed_by_definition(row[::-1])]
    assert unpack_eights(got).tolist() == values.tolist()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8))
def test_the_lowest_four_bits_of_any_value_are_taken(row: list[int]) -> None:
    assert npu.npu_convert_weight_to_int4pack(torch.tensor([row], dtype=torch.int32)).tolist() == [
        packed_by_definition(row)
    ]


def test_three_axes_and_tensors_without_values() -> None:
    values = int4(3, 5, 16)
    packed = npu.npu_convert_weight_to_int4pack(values, 1)
    assert packed.shape == (3, 5, 2)
    assert torch.equal(unpack_eights(packed), values.to(torch.int8))
    assert npu.npu_convert_weight_to_int4pack(int4(0, 16)).shape == (0, 2)
    assert unpack_eights(packed[:0]).shape == (0, 5, 16)
    assert torch.equal(unpack_eights(packed.transpose(0, 1)), values.transpose(0, 1).to(torch.int8))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.int32), ValueError, r"the weight is \[2, 12\]"),
        (torch.zeros(16, dtype=torch.int32), ValueError, r"the weight is \[16\]"),
        (torch.zeros(2, 16), NotImplementedError, "packs int32, not torch.float32"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        npu.npu_convert_weight_to_int4pack(weight)


@pytest.mark.parametrize("along", ["k", "n"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 64, 32), (1, 8, 8), (7, 1208, 24), (0, 16, 8), (70, 24, 40)])
def test_the_product(along: str, m: int, k: int, n: int) -> None:
    """Packed along k as a transposed view, or along n; scaled per column and per row, in float64."""
    x, w = int4(m, k), int4(n, k)
    scale, tokens, bias = torch.rand(n) + 0.5, torch.rand(m) + 0.5, torch.randn(n)
    x2 = pack_eights(w).t() if along == "k" else pack_eights(w.t().contiguous())
    got = npu.npu_quant_matmul(pack_eights(x), x2, scale, pertoken_scale=tokens, bias=bias, output_dtype=torch.float32)
    sums = x.to(torch.float64) @ w.to(torch.float64).t()
    exact = sums * scale.to(torch.float64) * tokens[:, None].to(torch.float64) + bias
    torch.testing.assert_close(got.to(torch.float64), exact, rtol=1e-6, atol=1e-5)
    integers = npu.npu_quant_matmul(pack_eights(x), x2, scale, output_dtype=torch.int32)
    assert torch.equal(integers.to(torch.float64), sums)


@pytest.mark.parametrize("block", [1, 40, 2**20])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("m", [1, 16, 17])
def test_the_product_in_halves_and_the_unpacked_one(
    monkeypatch: pytest.MonkeyPatch, block: int, fast: bool, m: int
) -> None:
    """The second serves where the processor has a fast int8 product; blocks of a weight change nothing."""
    used: list[int] = []

    def fast_product(a: Tensor, b: Tensor) -> Tensor:
        used.append(len(a))
        return int8_gemm.float32_blocks(a, b)

    monkeypatch.setattr(int4_gemm, "_BLOCK", block)
    monkeypatch.setattr(int8_gemm, "choose", lambda rows: fast_product if fast else int8_gemm.float32_blocks)
    x, w = int4(m, 24), int4(21, 24)
    assert torch.equal(int4_gemm.int4_gemm(pack_eights(x), pack_eights(w).t()), x @ w.t())
    assert used == ([17] if fast and m == 17 else [])


@pytest.mark.parametrize("pair", [(-8, -8), (7, -8), (-8, 7), (7, 7)])
def test_the_largest_sums_of_a_device_are_exact(pair: tuple[int, int]) -> None:
    k = 65528
    x, w = torch.full((2, k), pair[0], dtype=torch.int32), torch.full((3, k), pair[1], dtype=torch.int32)
    w[1, 5] += 1 if pair[1] < 0 else -1
    got = npu.npu_quant_matmul(pack_eights(x), pack_eights(w).t(), torch.ones(1), output_dtype=torch.int32)
    want = torch.tensor([k * pair[0] * pair[1]] * 3)
    want[1] += pair[0] * (1 if pair[1] < 0 else -1)
    assert got.tolist() == [want.tolist()] * 2


def test_batches_of_rows_share_a_weight() -> None:
    x, w = int4(2, 3, 16), int4(8, 16)
    got = npu.npu_quant_matmul(pack_eights(x), pack_eights(w).t(), torch.ones(1), output_dtype=torch.int32)
    assert torch.equal(got, x @ w.t())
    each = torch.stack([pack_eights(w).t(), pack_eights(w.flip(0)).t()])  # a weight of each batch's own
    got = npu.npu_quant_matmul(pack_eights(x), each, torch.ones(1), output_dtype=torch.int32)
    assert torch.equal(got, torch.stack([x[0] @ w.t(), x[1] @ w.flip(0).t()]))


def test_a_weight_that_lost_its_strides_is_told_by_its_shape() -> None:
    x, w = int4(3, 64), int4(32, 64)
    got = npu.npu_quant_matmul(pack_eights(x), pack_eights(w).t().contiguous(), torch.ones(1), output_dtype=torch.int32)
    assert torch.equal(got, (x @ w.t()))


@pytest.mark.parametrize("x2", [torch.zeros(7, 16, dtype=torch.int32), torch.zeros(16, 8, dtype=torch.int8)])
def test_operands_that_do_not_fit(x2: Any) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"has not 16 input features|not torch.int32"):
        npu.npu_quant_matmul(torch.zeros(3, 2, dtype=torch.int32), x2, torch.ones(1), output_dtype=torch.float32)
