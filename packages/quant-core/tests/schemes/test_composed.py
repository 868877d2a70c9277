"""Rotations and low-rank parts around any linear type, against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import w8a8_dynamic, w8a16
from torch import Tensor

from quant_core import AscendLinearScheme, LinearContext, Partition
from quant_core.schemes.composed import ComposedLinearMethod, compose, reasons_against
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.verify import verify_stored

INPUTS = 48


def orthogonal(size: int) -> Tensor:
    """A random rotation."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].float()


def serve(workbench: Any, base: Any, members: list[Any], **options: Any) -> tuple[AscendLinearScheme, Any]:
    """As `Workbench.serve`, with the additions that the files ask for."""
    scheme = compose(base, workbench.context(members, **options))
    assert isinstance(scheme, ComposedLinearMethod)
    assert reasons_against(base, scheme.context) == []
    verify_stored(scheme)
    layer = workbench.load(scheme, members)
    scheme.process_weights_after_loading(layer)
    return scheme, layer


def float_weight(stored: dict[str, Tensor]) -> Tensor:
    return stored["weight"].double() * stored["weight_scale"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 3)])
def test_kronecker_rotation_and_low_rank(workbench: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Both at once, in a layer of two members, which share the rotation and not the low-rank part."""
    m, n = orthogonal(6), orthogonal(8)
    members = []
    for size in (24, 8):
        low_rank = {"svd_lowrank_l1": torch.randn(3, INPUTS), "svd_lowrank_l2": torch.randn(size, 3)}
        rotation = {"kronecker_rotation_m": m, "kronecker_rotation_n": n}
        members.append(w8a16(size, INPUTS) | rotation | low_rank)
    scheme, layer = serve(workbench, AscendW8A16LinearMethod, members, dtype=dtype)
    x, bias = torch.randn(*shape, INPUTS).to(dtype), torch.randn(32).to(dtype)
    rotated = (m.double().t() @ x.double().view(-1, 6, 8) @ n.double()).view(*shape, INPUTS)
    parts = [
        rotated @ float_weight(one).t()
        + x.double() @ one["svd_lowrank_l1"].double().t() @ one["svd_lowrank_l2"].double().t()
        for one in members
    ]
    exact = torch.cat(parts, -1) + bias.double()
    got = scheme.apply(layer, x, bias)
    assert (got.shape, got.dtype) == ((*shape, 32), dtype)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 0.3)


def test_heads_rotation_comes_before_quantisation(workbench: Any) -> None:
    """x' = rotationᵀ · [heads, head size]; its scale per token is that of the rotated token."""
    rotation = orthogonal(4)
    stored = w8a8_dynamic(16, INPUTS) | {"heads_rotation": rotation}
    scheme, layer = serve(workbench, AscendW8A8DynamicLinearMethod, [stored])
    x = torch.randn(5, INPUTS)
    rotated = (rotation.double().t() @ x.double().view(5, 4, 12)).view(5, INPUTS)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    exact = (rotated / scale).round() * scale @ float_weight(stored).t()
    torch.testing.assert_close(scheme.apply(layer, x).double(), exact, rtol=1e-4, atol=1e-3)
    # What multiplies the input as it comes: the stored weight, rotated back.
    turned = (rotation.double() @ float_weight(stored).unflatten(1, (4, 12))).flatten(1)
    torch.testing.assert_close(scheme.dequantize(workbench.load(scheme, [stored])).double(), turned)


def test_a_low_rank_part_is_cut_over_ranks(workbench: Any) -> None:
    """A row-parallel layer's ranks each add the part of their input features, column-parallel ones their rows."""
    low_rank = {"svd_lowrank_l1": torch.randn(3, INPUTS), "svd_lowrank_l2": torch.randn(16, 3)}
    stored, x = w8a16(16, INPUTS) | low_rank, torch.randn(5, INPUTS)
    scheme, layer = serve(workbench, AscendW8A16LinearMethod, [stored])
    whole = scheme.apply(layer, x)
    rows, columns = [], []
    for rank in range(2):
        scheme, layer = serve(workbench, AscendW8A16LinearMethod, [stored], partition=Partition("row", rank, 2))
        rows.append(scheme.apply(layer, x.chunk(2, -1)[rank], tp_rank=rank))
        scheme, layer = serve(workbench, AscendW8A16LinearMethod, [stored], partition=Partition("column", rank, 2))
        columns.append(scheme.apply(layer, x, tp_rank=rank))
    torch.testing.assert_close(sum(rows), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(columns, -1), whole, rtol=1e-4, atol=1e-4)


def refusals(workbench: Any, partition: Partition | None = None, **tensors: Tensor) -> list[str]:
    context: LinearContext = workbench.context([w8a16(16, INPUTS) | tensors], partition=partition or Partition())
    return reasons_against(AscendW8A16LinearMethod, context)


def test_what_cannot_be_applied_is_refused_before_loading(workbench: Any) -> None:
    cut = Partition("row", 0, 2)
    (reason,) = refusals(workbench, cut, heads_rotation=orthogonal(4))
    assert "mixes input features of all 2 tensor-parallel ranks: use tensor_parallel_size 1" in reason
    (reason,) = refusals(workbench, kronecker_rotation_m=orthogonal(6), kronecker_rotation_n=orthogonal(6))
    assert reason == "kronecker_rotation_m and kronecker_rotation_n of 6 x 6 do not rotate 48 input features"
    (reason,) = refusals(workbench, kronecker_rotation_m=orthogonal(6))
    assert reason == "expected square matrices, the files hold kronecker_rotation_m [6, 6], kronecker_rotation_n []"
    (reason,) = refusals(workbench, svd_lowrank_l1=torch.ones(3, INPUTS), svd_lowrank_l2=torch.ones(16, 4))
    assert "are not [rank, in] and [out, rank]" in reason
    assert refusals(workbench, Partition("column", 0, 2), heads_rotation=orthogonal(4)) == []


def test_without_additions_the_scheme_stays_itself(workbench: Any) -> None:
    scheme = compose(AscendW8A16LinearMethod, workbench.context([w8a16(16, INPUTS)]))
    assert type(scheme) is AscendW8A16LinearMethod


def test_compiled_it_equals_eager(workbench: Any, compile_afresh: Any) -> None:
    stored = w8a8_dynamic(16, INPUTS) | {"heads_rotation": orthogonal(4)}
    scheme, layer = serve(workbench, AscendW8A8DynamicLinearMethod, [stored])
    compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, INPUTS)
        assert torch.equal(compiled(x), scheme.apply(layer, x))


def test_the_dequantised_weight_is_what_the_input_is_multiplied_by(workbench: Any) -> None:
    """With all additions at once: rotations are undone in the opposite order, and the low-rank part comes last."""
    members = []
    matrices = {
        "heads_rotation": orthogonal(4),
        "kronecker_rotation_m": orthogonal(6),
        "kronecker_rotation_n": orthogonal(8),
    }
    for size in (16, 8):
        low_rank = {"svd_lowrank_l1": torch.randn(3, INPUTS), "svd_lowrank_l2": torch.randn(size, 3)}
        members.append(w8a16(size, INPUTS, asymmetric=True) | matrices | low_rank)
    scheme, layer = serve(workbench, AscendW8A16LinearMethod, members)
    weight = scheme.dequantize(workbench.load(scheme, members))
    x = torch.randn(5, INPUTS)
    exact = x.double() @ weight.double().t()
    assert (scheme.apply(layer, x).double() - exact).norm() / exact.norm() < 1e-5


def test_a_transform_that_nothing_applies_is_a_reason_against(workbench: Any) -> None:
    context = workbench.context([w8a16(16, INPUTS)], scheme_class=AscendW8A16LinearMethod)
    stored = (replace(context.stored[0], transforms=("hadamard",)),)
    (reason,) = reasons_against(AscendW8A16LinearMethod, replace(context, stored=stored))
    assert reason == "nothing applies the transform 'hadamard', which the format states"
