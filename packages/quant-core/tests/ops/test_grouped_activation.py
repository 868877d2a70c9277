"""Products of experts that are activated and quantised at once: the same bits as in single steps."""

from typing import Any

import pytest
import torch
from grouped_kinds import COUNTS, E, K, codes
from torch import Tensor

from quant_core.packing import pack_eights

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")

N = 48


def operands(m: int) -> dict[str, Tensor]:
    """int8 operands."""
    return {
        "x": codes(m, K),
        "weight": codes(E, N, K).transpose(1, 2),
        "weight_scale": torch.rand(E, N) / 1000,
        "x_scale": torch.rand(m),
    }


def second(given: dict[str, Tensor], counts: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    """npu_grouped_matmul_swiglu_quant_v2 with counts; it takes weights in lists, and the group list last."""
    result: tuple[Tensor, Tensor] = npu.npu_grouped_matmul_swiglu_quant_v2(
        given["x"],
        [given["weight"]],
        [given["weight_scale"]],
        given["x_scale"],
        torch.tensor(counts),
        **{"group_list_type": 1} | options,
    )
    return result


@pytest.mark.parametrize("case", COUNTS)
def test_int8_in_single_steps(case: str) -> None:
    counts = COUNTS[case]
    total = sum(counts)
    given = operands(total + 2)
    given["x_scale"][total:] = float("nan")
    ends = torch.tensor(counts).cumsum(0)
    codes, scale, unused = npu.npu_grouped_matmul_swiglu_quant(
        given["x"], given["weight"], ends, given["weight_scale"], given["x_scale"]
    )
    (sums,) = npu.npu_grouped_matmul(
        [given["x"]],
        [given["weight"]],
        split_item=2,
        group_type=0,
        group_list=ends,
        output_dtype=torch.int32,
    )
    steps = npu.npu_dequant_swiglu_quant(
        sums,
        weight_scale=given["weight_scale"],
        activation_scale=given["x_scale"],
        group_index=torch.tensor(counts),
        activate_left=True,
        quant_mode=1,
    )
    assert all(map(torch.equal, (codes, scale), steps))
    assert all(map(torch.equal, (codes, scale), second(given, counts)))
    assert all(map(torch.equal, (codes, scale), second(given, list(ends), group_list_type=0)))
    assert not scale[total:].any()
    assert unused.shape == ()


def test_int8_against_float64() -> None:
    given, counts = operands(9), [4, 0, 5, 0, 0]
    codes, scale = second(given, counts)
    experts = torch.arange(E).repeat_interleave(torch.tensor(counts))
    values = torch.einsum("mk,mkn->mn", given["x"].double(), given["weight"].double()[experts])
    values = values * given["weight_scale"].double()[experts] * given["x_scale"].double()[:, None]
    left, right = values.chunk(2, dim=1)
    exact = left / (1 + (-left).exp()) * right
    torch.testing.assert_close(scale.double(), exact.abs().amax(dim=1) / 127, rtol=1e-5, atol=0)
    assert (codes - exact / scale[:, None].double()).abs().max().item() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(E, N // 2), (E,)])
def test_smoothing_of_each_expert(shape: tuple[int, ...]) -> None:
    given, counts = operands(9), [4, 0, 3, 0, 2]
    smooth = torch.rand(shape) + 0.5
    got = second(given, counts, smooth_scale=smooth)
    assert not torch.equal(got[1], second(given, counts)[1])
    (sums,) = npu.npu_grouped_matmul(
        [given["x"]],
        [given["weight"]],
        split_item=2,
        group_type=0,
        group_list_type=1,
        group_list=torch.tensor(counts),
        output_dtype=torch.int32,
    )
    steps = npu.npu_dequant_swiglu_quant(
        sums,
        weight_scale=given["weight_scale"],
        activation_scale=given["x_scale"],
        quant_scale=smooth.view(E, -1).expand(E, N // 2),
        group_index=torch.tensor(counts),
        activate_left=True,
        quant_mode=1,
    )
    assert all(map(torch.equal, got, steps))


@pytest.mark.parametrize("form", ["int4", "int4 decoded, in groups"])
def test_int4_in_single_steps(form: str) -> None:
    given, counts = operands(9), [4, 0, 3, 0, 1]
    values = torch.randint(-8, 8, (E, K, N), dtype=torch.int8)
    scale, assist = torch.rand(E, 2, N) / 1000, None
    given["weight"], given["weight_scale"] = values, scale
    if form == "int4":
        given["weight"], given["weight_scale"] = pack_eights(values), scale.view(torch.int32).to(torch.int64)
        assist = torch.randn(E, N)
    options = {"weight_assist_matrix": [assist]} if assist is not None else {}
    got = second(given, counts, **options)
    (product,) = npu.npu_grouped_matmul(
        [given["x"]],
        [given["weight"]],
        scale=[given["weight_scale"]],
        bias=None if assist is None else [assist],
        per_token_scale=[given["x_scale"]],
        split_item=2,
        group_type=0,
        group_list_type=1,
        group_list=torch.tensor(counts),
        output_dtype=torch.float32,
    )
    steps = npu.npu_dynamic_quant(npu.npu_swiglu(product))
    assert all(map(torch.equal, got, steps))
    if assist is not None:
        assert all(map(torch.equal, got, second(given, counts, bias=assist)))
        ends = torch.tensor(counts).cumsum(0)
        first = npu.npu_grouped_matmul_swiglu_quant(
            given["x"], given["weight"], ends, given["weight_scale"], given["x_scale"], bias=assist
        )
        assert all(map(torch.equal, got, first[:2]))


def test_mxfp8_in_single_steps() -> None:
    counts = [4, 0, 3, 0, 1]
    x, x_scale = npu.npu_dynamic_mx_quant(torch.randn(9, K), dst_type=torch.float8_e4m3fn)
    weight, scale = npu.npu_dynamic_mx_quant(torch.randn(E, 256, K), dst_type=torch.float8_e4m3fn)
    given = {"x": x, "weight": weight.transpose(1, 2), "weight_scale": scale.transpose(1, 2), "x_scale": x_scale}
    form = {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": torch.float8_e4m3fn}
    elements, exponents = second(given, counts, **form, weight_scale_dtype=293, x_scale_dtype=293)
    (product,) = npu.npu_grouped_matmul(
        [x],
        [given["weight"]],
        scale=[given["weight_scale"]],
        per_token_scale=[x_scale],
        scale_dtype=293,
        per_token_scale_dtype=293,
        split_item=2,
        group_type=0,
        group_list_type=1,
        group_list=torch.tensor(counts),
        output_dtype=torch.float32,
    )
    want, want_exponents = npu.npu_dynamic_mx_quant(npu.npu_swiglu(product), dst_type=torch.float8_e4m3fn)
    assert torch.equal(elements.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(exponents, want_exponents)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_mode": 2},
        {"dequant_mode": 2, "quant_mode": 2, "quant_dtype": 296},
        {"dequant_dtype": torch.float16},
        {"bias": torch.ones(E, N)},
    ],
)
def test_what_the_kernel_does_not_have_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="npu_grouped_matmul_swiglu_quant"):
        second(operands(5), [1] * E, **options)
