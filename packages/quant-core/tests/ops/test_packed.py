"""int8 weights that are packed once: the same bits as with plain ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.ops.cpu import int8_gemm, packed

npu = torch.ops.npu

E, K, N = 3, 1100, 24


def weight_of(k: int = K, n: int = N) -> Tensor:
    """[k, n] as schemes hold it, with the largest values in it: sums beyond what float32 holds."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    weight[0], weight[1] = 127, -128
    return weight.t()


def rows_of(m: int, k: int = K) -> Tensor:
    """[m, k], one row of which is as large as can be."""
    rows = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    rows[:1] = -128
    rows[:1, ::2] = 127
    return rows


def pack(weight: Tensor) -> Tensor:
    """Packed if this processor multiplies such weights rightly, otherwise plain: then nobody has other ones."""
    result = packed.pack(weight)
    return weight if result is None else result


def test_they_are_refused_if_one_sum_is_wrong() -> None:
    """By the same probe as other products, and for the same reason."""
    assert (packed.refusal() is None) == (packed.pack(weight_of()) is not None)
    wrong = int8_gemm.refusal(lambda a, b: packed.packed_product(a, torch.ops.onednn.qlinear_prepack(b.t(), None)) + 1)
    assert wrong is not None


@pytest.mark.parametrize("m", [0, 1, 2, 7, 65])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_linear_product(m: int, target: torch.dtype, per_token: bool) -> None:
    x, weight, scale = rows_of(m), weight_of(), torch.rand(N) / 1000
    options = {
        "pertoken_scale": torch.rand(m) if per_token else None,
        "bias": torch.randn(N),
        "output_dtype": target,
    }
    want = npu.npu_quant_matmul(x, weight, scale, **options)
    assert torch.equal(npu.npu_quant_matmul(x, pack(weight), scale, **options), want)
    assert torch.equal(npu.npu_quant_matmul(x[None], pack(weight), scale, **options), want[None])


def test_exact_integers_only_where_float32_holds_them() -> None:
    x, weight = rows_of(5, 1024), weight_of(1024)
    bias, options = torch.randint(-(2**20), 2**20, (N,), dtype=torch.int32), {"output_dtype": torch.int32}
    want = npu.npu_quant_matmul(x, weight, torch.ones(1), bias=bias, **options)
    assert torch.equal(npu.npu_quant_matmul(x, pack(weight), torch.ones(1), bias=bias, **options), want)
    if packed.refusal() is not None:
        return
    for refused in ({"output_dtype": torch.int32}, {}, {"output_dtype": torch.float32, "bias": bias}):
        with pytest.raises(NotImplementedError, match="1100 input features gives no exact integers"):
            npu.npu_quant_matmul(rows_of(2), pack(weight_of()), torch.ones(1), **refused)


@pytest.mark.parametrize("counts", [[2, 0, 4], [0, 1, 0], [70, 1, 1], [0, 0, 0]])
def test_experts(counts: list[int]) -> None:
    m = sum(counts) + 1
    x, tokens, scale, weights = rows_of(m), torch.rand(m), torch.rand(E, N) / 1000, [weight_of() for _ in range(E)]
    groups = {"group_list": torch.tensor(counts), "group_list_type": 1}
    options = {"scale": [scale], "per_token_scale": [tokens], "split_item": 2, "group_type": 0, **groups}
    want, got = (
        npu.npu_grouped_matmul([x], each, output_dtype=torch.bfloat16, **options)
        for each in (weights, list(map(pack, weights)))
    )
    assert torch.equal(got[0], want[0])
    stacked = npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [torch.stack(weights)], [scale], tokens, groups["group_list"], group_list_type=1
    )
    listed = npu.npu_grouped_matmul_swiglu_quant_v2(
        x, list(map(pack, weights)), [scale], tokens, groups["group_list"], group_list_type=1
    )
    assert all(map(torch.equal, listed, stacked))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, compile_afresh: Callable[..., Any]) -> None:
    layer = torch.nn.Module()
    plain, scale = [weight_of() for _ in range(E)], torch.rand(E, N) / 1000
    layer.weights = list(map(pack, plain))

    def forward(x: Tensor, counts: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        codes, tokens = npu.npu_dynamic_quant(x)
        (y,) = npu.npu_grouped_matmul(
            [codes],
            layer.weights if weights is None else weights,
            scale=[scale],
            per_token_scale=[tokens],
            split_item=2,
            group_type=0,
            group_list_type=1,
            group_list=counts,
            output_dtype=torch.float32,
        )
        return y + 1

    compiled = compile_afresh(forward, backend=backend, dynamic=True)
    for counts in ([2, 0, 4], [0, 9, 0]):
        x = torch.randn(sum(counts), K)
        assert torch.equal(compiled(x, torch.tensor(counts)), forward(x, torch.tensor(counts), plain))
