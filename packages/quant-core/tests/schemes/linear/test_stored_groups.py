"""Weight-only types in the forms of compressed-tensors: packed, per tensor, and with groups of any input features."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_modules import exact_weight, integers
from stating import Stated
from torch import Tensor

from quant_core import AscendLinearScheme, LinearContext, LoadError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.handover import check_shared
from quant_core.schemes.linear.w4a16 import AscendW4A16LinearMethod
from quant_core.schemes.linear.w8a16 import AscendW8A16LinearMethod
from quant_core.schemes.verify import check_values, linear_params, verify_stored

INPUTS, F32, BF16 = 64, torch.float32, torch.bfloat16

TYPES: dict[int, type[AscendLinearScheme]] = {8: AscendW8A16LinearMethod, 4: AscendW4A16LinearMethod}
STRATEGIES = [("tensor", 1, False), ("channel", 1, False), ("group", 4, False), ("group", 4, True)]


def weight_of(module: Stated, dtype: torch.dtype) -> Tensor:
    """(q - weight_offset) · weight_scale in float64, every factor in the model's dtype as the operator has it."""
    codes, offset, scale = exact_weight(module)
    return ((codes - offset) * scale.to(dtype).to(torch.float64)).to(dtype).to(torch.float64)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Equal to x @ weightᵀ + bias up to float32 sums and one rounding to x's dtype."""
    exact = x.to(torch.float64) @ weight.t() + (0 if bias is None else bias.to(torch.float64))
    magnitude = x.to(torch.float64).abs() @ weight.abs().t()
    tolerance = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-20 * magnitude
    assert bool(((got.to(torch.float64) - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("num_bits", TYPES)
@pytest.mark.parametrize(("strategy", "groups", "indexed"), STRATEGIES)
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "910B"])
def test_the_formula(
    workbench: Any,
    num_bits: int,
    strategy: str,
    groups: int,
    indexed: bool,
    asymmetric: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Of fused members that share their input and its groups."""
    packed = strategy != "tensor" or not asymmetric
    options = {"asymmetric": asymmetric, "packed": packed, "model": dtype, "indexed": indexed, "scalar": groups == 1}
    members = [integers(out, INPUTS, num_bits, strategy, groups, **options) for out in (24, 8)]
    with planned_device(device):
        context = workbench.context(members, dtype)
        assert TYPES[num_bits].can_serve(context) == []
        scheme, layer = workbench.serve(TYPES[num_bits], members, dtype=dtype)
        verify_stored(scheme)
    x, bias = torch.randn(7, INPUTS).to(dtype), torch.randn(32).to(dtype)
    weight = torch.cat([weight_of(member, dtype) for member in members])
    check(scheme.apply(layer, x), x, weight)
    check(scheme.apply(layer, x.view(7, 1, INPUTS), bias).view(7, 32), x, weight, bias)
    assert hasattr(layer, "weight_g_idx") == indexed


@pytest.mark.parametrize("num_bits", TYPES)
@pytest.mark.parametrize(("strategy", "groups", "indexed"), STRATEGIES)
def test_dequantised_features_are_in_their_own_order(
    workbench: Any, num_bits: int, strategy: str, groups: int, indexed: bool
) -> None:
    packed = strategy != "tensor"
    module = integers(16, INPUTS, num_bits, strategy, groups, packed, packed, F32, indexed=indexed)
    scheme = TYPES[num_bits].create(workbench.context([module]))
    codes, offset, scale = exact_weight(module)
    found = scheme.dequantize(workbench.load(scheme, [module]))
    torch.testing.assert_close(found.to(torch.float64), (codes - offset) * scale)
    again = scheme.quantize(found)
    error = (scheme.dequantize(workbench.load(scheme, [Stated(again, module.weight, None)])) - found).abs().max()
    assert error <= again["weight_scale"].max() * 0.51


@pytest.mark.parametrize("num_bits", TYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_outputs_are_those_of_one_rank(workbench: Any, num_bits: int, size: int) -> None:
    options: dict[str, Any] = {"asymmetric": True, "packed": True}
    for strategy, groups in (("channel", 1), ("group", 4)):
        members = [integers(out, INPUTS, num_bits, strategy, groups, **options) for out in (64, 32)]
        x, weight = torch.randn(3, INPUTS), torch.cat([weight_of(member, F32) for member in members])
        for kind in ("column", "row"):
            check(workbench.run_ranks(TYPES[num_bits], members, x, kind, size), x, weight)
    members = [integers(out, INPUTS, num_bits, "group", 4, indexed=True, **options) for out in (64, 32)]
    weight = torch.cat([weight_of(member, F32) for member in members])
    check(workbench.run_ranks(TYPES[num_bits], members, x, "column", size), x, weight)
    check(workbench.run_ranks(TYPES[num_bits], members, x, "row", 1), x, weight)


def test_stored_groups_are_not_cut_over_ranks_nor_served_for_experts(workbench: Any) -> None:
    module = integers(16, INPUTS, 4, "group", 4, packed=True, indexed=True)
    todo = "quantise with `actorder: static` (or `weight`), which keeps the order in which features are stored"
    cut: LinearContext = workbench.context([module], partition=Partition("row", 1, 2))
    assert AscendW4A16LinearMethod.can_serve(cut) == [
        "groups that are not made of neighbours (weight_g_idx) are not served for a layer whose input features are cut "
        f"over 2 ranks: {todo}"
    ]
    stacked = workbench.context([module], stack=(("experts.0.down_proj",), ("experts.1.down_proj",)))
    assert AscendW4A16LinearMethod.can_serve(stacked) == [
        f"groups that are not made of neighbours (weight_g_idx) are not served for experts: {todo}"
    ]


def test_members_share_one_order(workbench: Any) -> None:
    """Their input is gathered once."""
    members = [integers(8, INPUTS, 4, "group", 4, packed=True, indexed=True) for _ in range(2)]
    context = workbench.context(members)
    check_shared(context, "weight_g_idx", torch.stack([m["weight_g_idx"] for m in members]))
    members[1]["weight_g_idx"] = members[1]["weight_g_idx"].flip(0)
    with pytest.raises(LoadError, match=r"m1\.weight_g_idx"):
        check_shared(context, "weight_g_idx", torch.stack([m["weight_g_idx"] for m in members]))


def test_groups_of_unequal_size_are_refused(workbench: Any) -> None:
    module = integers(8, INPUTS, 4, "group", 4, packed=True, indexed=True)
    scheme = AscendW4A16LinearMethod.create(workbench.context([module]))
    (param,) = linear_params(scheme)["weight_g_idx"]
    check_values("l", ["m0.weight_g_idx"], param, module["weight_g_idx"])
    uneven = module["weight_g_idx"].sort().values
    uneven[15] = 1
    with pytest.raises(LoadError, match="group 0 has 15 input features, and not 16"):
        check_values("l", ["m0.weight_g_idx"], param, uneven)


@pytest.mark.parametrize("num_bits", TYPES)
def test_compiled_code_follows_a_reload_with_another_order(
    workbench: Any, num_bits: int, compile_afresh: Callable[..., Any]
) -> None:
    """Also from features in their own order, which a graph must not have taken for granted."""
    plain = integers(16, INPUTS, num_bits, "group", 4, packed=True, indexed=True)
    plain["weight_g_idx"] = plain["weight_g_idx"].sort().values
    scheme, layer = workbench.serve(TYPES[num_bits], [plain])
    compiled, x = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager"), torch.randn(5, INPUTS)
    check(compiled(x), x, weight_of(plain, F32))
    other = integers(16, INPUTS, num_bits, "group", 4, packed=True, indexed=True)
    _, loaded = workbench.serve(TYPES[num_bits], [other])
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(loaded.get_parameter(name).data)
    check(compiled(x), x, weight_of(other, F32))
