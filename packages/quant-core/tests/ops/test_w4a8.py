"""int8 activations times int4 weights in groups of 256."""

from typing import Any

import pytest
import torch
from bits import pack_eights
from torch import Tensor

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")

N = 24


def operands(tokens: int, groups: int) -> dict[str, Tensor]:
    """A call's arguments; scales have few bits, so that encoding them loses nothing."""
    scale = torch.randint(1, 64, (groups, N)) / 4096
    return {
        "x1": torch.randint(-128, 128, (tokens, 256 * groups), dtype=torch.int8),
        "codes": torch.randint(-8, 8, (256 * groups, N), dtype=torch.int8),
        "scale": scale,
        "offset": torch.randn(N),
        "pertoken_scale": torch.rand(tokens, 1),
    }


def call(given: dict[str, Tensor], **changes: Any) -> Tensor:
    """The operator on operands, some of them changed."""
    scale = given["scale"]
    arguments: dict[str, Any] = {
        "scale": npu.npu_trans_quant_param(scale.flatten()).view(scale.shape),
        "offset": given["offset"],
        "pertoken_scale": given["pertoken_scale"],
        "output_dtype": torch.float32,
        "group_sizes": [0, 0, 256],
        **changes,
    }
    return npu.npu_quant_matmul(arguments.pop("x1", given["x1"]), pack_eights(given["codes"]), **arguments)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition(groups: int, tokens: int, target: torch.dtype) -> None:
    """(Σ (x1 - 8) @ w * scale + offset) * pertoken_scale, in float64."""
    given = operands(tokens, groups)
    weight = given["codes"].double() * given["scale"].double().repeat_interleave(256, dim=0)
    exact = ((given["x1"].double() - 8) @ weight + given["offset"].double()) * given["pertoken_scale"].double()
    got = call(given, output_dtype=target)
    assert got.dtype == target
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(target).eps, atol=1e-4)


def test_the_assist_term_cancels_the_shift() -> None:
    """With offset = 8 Σ w * scale nothing is left of the 8."""
    given = operands(5, 2)
    weight = given["codes"].double() * given["scale"].double().repeat_interleave(256, dim=0)
    got = call(given, offset=8 * weight.sum(dim=0).float(), pertoken_scale=torch.ones(5, 1))
    torch.testing.assert_close(got.double(), given["x1"].double() @ weight, rtol=1e-6, atol=1e-3)


def test_no_group_sizes_mean_256() -> None:
    given = operands(3, 2)
    assert torch.equal(call(given, group_sizes=None), call(given))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"offset": None}, ValueError, r"offset of int8 x int4 is None, expected torch.float32 \[24\]"),
        ({"pertoken_scale": torch.ones(3)}, ValueError, r"pertoken_scale .* expected torch.float32 \[3, 1\]"),
        ({"scale": torch.ones(2, N)}, ValueError, r"scale .* torch.float32 \[2, 24\], expected torch.int64 \[2, 24\]"),
        ({"x1": torch.zeros(3, 128, dtype=torch.int8)}, ValueError, r"x1 \[3, 128\] and x2 \[512, 3\]"),
        ({"bias": torch.ones(N, dtype=torch.int32)}, ValueError, "no bias"),
        ({"output_dtype": None}, NotImplementedError, "int8"),
        ({"group_sizes": [0, 0, 128]}, NotImplementedError, r"\[0, 0, 128\]"),
    ],
)
def test_what_the_device_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(operands(3, 2), **changes)
