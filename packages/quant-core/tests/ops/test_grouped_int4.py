"""npu_grouped_matmul of int8 activations and int4 weights: the device's two-stage form, and ours of decoded weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.packing import pack_eights

npu = torch.ops.npu
pytestmark = pytest.mark.usefixtures("each_gemm")

E, K, N = 3, 512, 24
COUNTS = [4, 0, 2]
EXPERTS = torch.tensor([0, 0, 0, 0, 2, 2])


class Operands:
    """Operands of a call, one row of them behind the last group."""

    def __init__(self, groups: int) -> None:
        self.x = torch.randint(-128, 128, (7, K), dtype=torch.int8)
        self.tokens = torch.rand(7)
        self.codes = torch.randint(-8, 8, (E, K, N), dtype=torch.int8)
        # Few bits, so that no encoding of a float32 loses any.
        self.scale = torch.randint(1, 64, (E, groups, N)) / 4096
        self.weight = self.codes.double() * self.scale.double().repeat_interleave(K // groups, dim=1)
        self.assist = torch.randn(E, N)

    @property
    def encoded(self) -> Tensor:
        """A float32 in the low half of each int64."""
        return self.scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def call(self, **changes: Any) -> Tensor:
        """The operator on these operands, some of them changed."""
        given: dict[str, Any] = {
            "weight": [pack_eights(self.codes)],
            "scale": [self.encoded],
            "bias": [self.assist],
            "per_token_scale": [self.tokens],
            "split_item": 2,
            "group_type": 0,
            "group_list_type": 1,
            "group_list": torch.tensor(COUNTS),
            "output_dtype": torch.float32,
            **changes,
        }
        (result,) = npu.npu_grouped_matmul([self.x], given.pop("weight"), **given)
        assert isinstance(result, Tensor)
        return result

    def exact(self, shift: int, assist: Tensor) -> Tensor:
        """((x - shift) @ w + assist) · tokens, in float64."""
        product = torch.einsum("mk,mkn->mn", self.x[:6].double() - shift, self.weight[EXPERTS])
        return (product + assist[EXPERTS].double()) * self.tokens[:6, None].double()


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition(groups: int, target: torch.dtype) -> None:
    given = Operands(groups)
    got = given.call(output_dtype=target)
    exact = given.exact(8, given.assist)
    torch.testing.assert_close(got[:6].double(), exact, rtol=torch.finfo(target).eps, atol=1e-3)
    assert (got.dtype, got[6:].any().item()) == (target, False)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_assist_term_cancels_the_shift(groups: int) -> None:
    given = Operands(groups)
    got = given.call(bias=[8 * given.weight.sum(dim=1).float()])
    torch.testing.assert_close(got[:6].double(), given.exact(0, torch.zeros(E, N)), rtol=1e-5, atol=1e-3)


def test_a_linear_layer_computes_the_same_bits() -> None:
    """In its groups of 256, with scales that it takes as they are."""
    given = Operands(2)
    got, encoded = given.call(), npu.npu_trans_quant_param(given.scale.flatten()).view(given.scale.shape)
    assert torch.equal(got, given.call(scale=[encoded]))
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 6))):
        want = npu.npu_quant_matmul(
            given.x[rows],
            pack_eights(given.codes[expert]),
            encoded[expert],
            offset=given.assist[expert],
            pertoken_scale=given.tokens[rows, None],
            output_dtype=torch.float32,
        )
        assert torch.equal(got[rows], want)


@pytest.mark.parametrize("groups", [2, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_decoded_weights_in_groups_have_no_shift(groups: int, bias: bool) -> None:
    given = Operands(groups)
    added = [given.assist] if bias else None
    got = given.call(weight=[given.codes], scale=[given.scale], bias=added)
    exact = given.exact(0, torch.zeros(E, N)) + (given.assist[EXPERTS] if bias else 0)
    torch.testing.assert_close(got[:6].double(), exact, rtol=1e-5, atol=1e-3)
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 6))):  # as the linear schemes sum groups
        total, length = torch.zeros(rows.stop - rows.start, N), K // groups
        for group in range(groups):
            part = slice(group * length, (group + 1) * length)
            scale = given.scale[expert, group]
            total += scale * npu.npu_quant_matmul(
                given.x[rows, part].contiguous(), given.codes[expert, part], scale, output_dtype=torch.int32
            )
        total = total * given.tokens[rows, None]
        assert torch.equal(got[rows], total + given.assist[expert] if bias else total)


def test_one_group_is_a_channel() -> None:
    given = Operands(1)
    want = given.call(weight=[given.codes], scale=[given.scale[:, 0]], bias=None)
    assert torch.equal(given.call(weight=[given.codes], scale=[given.scale], bias=None), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, "8 Σ w · scale"),
        ({"per_token_scale": None}, "per_token_scale"),
        ({"scale": [torch.ones(E, 2, N)]}, r"torch.float32 \[2, 24\], expected int64"),
        ({"scale": [torch.ones(E, 3, N, dtype=torch.int64)]}, r"torch.int64 \[3, 24\], expected int64"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Operands(2).call(**changes)
