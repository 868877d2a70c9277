"""W4A4_FLATQUANT_DYNAMIC: the transform, int4 on both sides, and a clip ratio for each member."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bits import unpack_eights
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import flatquant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LimitError, LoadError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.handover import check_shared
from quant_core.schemes.linear import w4a4_flatquant_dynamic as module
from quant_core.schemes.linear.w4a4_flatquant_dynamic import (
    AscendW4A4FlatQuantDynamicLinearMethod as FlatQuant,
)
from quant_core.schemes.linear.w4a4_flatquant_dynamic import (
    batched_kronecker_quant,
    get_decompose_dim,
    pack_int4_weights,
)
from quant_core.schemes.verify import check_values, linear_params

#: What one checkpoint of the tool has for q, k and v.
RATIOS = (0.97997, 0.97993, 0.97992)

SIZES = [(8, 16), (6, 16), (5, 24), (3, 8), (1, 8)]

Stored = dict[str, Tensor]


def shear(size: int, factor: int = 2) -> Tensor:
    """Neither symmetric nor orthogonal, so that order and transposes show; the inverse is of small integers too."""
    half = size // 2
    return torch.roll(torch.eye(size) + torch.diag(torch.full((half,), float(factor)), size - half), 1, 0)


def unshear(size: int) -> Tensor:
    """The inverse of `shear`."""
    return torch.roll(shear(size, -2), -1, 0) @ torch.roll(torch.eye(size), 1, 0).t()


def sheared(out: int, left: int, right: int, ratio: float = 0.98, with_right: bool = True) -> Stored:
    """A module whose transform is exact in every dtype."""
    stored = {**flatquant(out, left * right, ratio), "left_trans": shear(left), "right_trans": shear(right)}
    return stored if with_right else {name: t for name, t in stored.items() if name != "right_trans"}


def matrices(stored: Stored, k: int) -> tuple[Tensor, Tensor]:
    left = stored["left_trans"].to(torch.float64)
    return left, stored.get("right_trans", torch.eye(k // len(left))).to(torch.float64)


def tokens_of(count: int, stored: Stored, dtype: torch.dtype) -> Tensor:
    """Inputs that the transform makes small integers times a power of two: no code depends on rounding."""
    left = len(stored["left_trans"])
    right = stored["weight"].shape[1] // left
    codes = torch.randint(-6, 7, (count, left, right)).to(torch.float32)
    codes[:, 0, 0] = 7
    back = unshear(right) if "right_trans" in stored else torch.eye(right)
    x = unshear(left).t() @ codes @ back
    return (x * 2.0 ** torch.randint(-4, 3, (count, 1, 1))).flatten(1).to(dtype)


def exact_output(x: Tensor, stored: Stored, bias: Tensor | None = None) -> Tensor:
    """Transform, quantise, multiply and scale in float64."""
    left, right = matrices(stored, x.shape[-1])
    turned = (left.t() @ x.to(torch.float64).view(len(x), len(left), len(right)) @ right).flatten(1)
    scale = turned.abs().amax(-1, keepdim=True) * stored["clip_ratio"].to(torch.float64) / 7
    codes = torch.where(scale > 0, torch.round(turned / scale), 0).clamp(-8, 7)
    y = codes @ stored["weight"].to(torch.float64).t() * scale * stored["weight_scale"].to(torch.float64).flatten()
    return y if bias is None else y + bias.to(torch.float64)


class Calls(TorchDispatchMode):
    """Counts calls of torch_npu's operators, and remembers how many tokens each transform was given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.counts[func._opname] += 1
            if func._opname == "npu_kronecker_quant":
                self.tokens.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("left", "right"), SIZES)
def test_the_inputs_are_what_they_should_be_after_the_transform(left: int, right: int) -> None:
    stored = sheared(8, left, right)
    x = tokens_of(3, stored, torch.bfloat16).to(torch.float32).unflatten(1, (left, right))
    codes = shear(left).t() @ x @ shear(right)
    codes = codes / codes[:, :1, :1] * 7
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [1.0, 0.98, 0.5])
@pytest.mark.parametrize("with_right", [True, False])
@pytest.mark.parametrize(("left", "right"), SIZES)
def test_the_formula(workbench: Any, dtype: torch.dtype, ratio: float, with_right: bool, left: int, right: int) -> None:
    """With clip 0.5, half of the codes saturate."""
    stored = sheared(24, left, right, ratio, with_right)
    scheme, layer = workbench.serve(FlatQuant, [stored], dtype=dtype)
    for count in (0, 1, 7):
        x, bias = tokens_of(count, stored, dtype), torch.randn(24).to(dtype)
        x[3:5] = 0
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        y = scheme.apply(layer, x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.to(torch.float64), exact_output(x, stored), **tolerance)
        assert not y[3:5].any()
        added = scheme.apply(layer, x, bias).to(torch.float64)
        torch.testing.assert_close(added, y.to(torch.float64) + bias.to(torch.float64), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 1, 0), (1, 1, 0), (2, 2, 2)])
def test_each_member_sees_activations_that_its_own_ratio_quantised(workbench: Any, order: tuple[int, ...]) -> None:
    """Ratios so near differ in the fifth digit of the result, and the tolerance is the sixth."""
    ratios = [RATIOS[index] for index in order]
    members = [sheared(out, 6, 16, ratio) for out, ratio in zip((24, 8, 8), ratios, strict=True)]
    scheme, layer = workbench.serve(FlatQuant, members)
    x = tokens_of(9, members[0], torch.float32)
    with Calls() as calls:
        got = scheme.apply(layer, x).split([24, 8, 8], dim=-1)
    assert calls.counts["npu_kronecker_quant"] == len(set(order)), "one call for each distinct ratio"
    for part, member in zip(got, members, strict=True):
        exact = exact_output(x, member)
        torch.testing.assert_close(part.to(torch.float64), exact, rtol=2e-6, atol=0)
        for ratio in set(RATIOS) - {member["clip_ratio"].item()} - set(ratios):
            other = exact_output(x, {**member, "clip_ratio": torch.tensor([ratio])})
            assert not torch.allclose(exact, other, rtol=4e-6, atol=0), "the test would not notice this ratio"


def test_the_matrices_of_a_bfloat16_model_are_rounded_to_bfloat16(workbench: Any) -> None:
    """Stored in float32, used in x's dtype."""
    stored = sheared(24, 4, 8)
    finer = {**stored, "left_trans": stored["left_trans"] * (1 + 2**-12), "right_trans": stored["right_trans"] + 2**-12}
    x = tokens_of(7, stored, torch.bfloat16)
    rounded = {**finer, **{n: finer[n].to(torch.bfloat16).to(torch.float32) for n in ("left_trans", "right_trans")}}
    outputs = []
    for member in (finer, rounded):
        scheme, layer = workbench.serve(FlatQuant, [member], dtype=torch.bfloat16)
        assert layer.left_trans.dtype == layer.right_trans.dtype == torch.bfloat16
        outputs.append(scheme.apply(layer, x))
    assert torch.equal(*outputs)


def test_many_tokens_go_through_the_operator_in_parts(workbench: Any, compile_afresh: Callable[..., Any]) -> None:
    """In compiled code too, whatever number of tokens it was traced with."""
    stored = sheared(24, 3, 8)
    scheme, layer = workbench.serve(FlatQuant, [stored])
    x = tokens_of(33000, stored, torch.float32)
    with Calls() as calls:
        y = scheme.apply(layer, x)
    assert calls.tokens == [32768, 232]
    torch.testing.assert_close(y.to(torch.float64), exact_output(x, stored), rtol=1e-6, atol=1e-6)
    for traced, others in ((5, (33000, 32768)), (33000, (7, 32769))):
        torch.compiler.reset()
        compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(x[:traced].clone()), y[:traced])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in others:
                assert torch.equal(compiled(x[:count].clone()), y[:count])


def test_the_operator_of_compiled_code_keeps_torch_s_rules() -> None:
    arguments = (torch.randn(3, 4, 8), torch.eye(4), torch.eye(8), 0.98)
    torch.library.opcheck(module._kronecker_quant_operator, arguments)
    torch.library.opcheck(module._by_stored_ratio_operator, (*arguments[:3], torch.tensor([0.98])))


def test_the_run_time_form(workbench: Any) -> None:
    members = [sheared(24, 6, 16), sheared(8, 6, 16, 0.9)]
    _, layer = workbench.serve(FlatQuant, members, dtype=torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((32, 12), torch.int32),
        "weight_scale": ((32,), torch.float32),
        "left_trans": ((6, 6), torch.bfloat16),
        "right_trans": ((16, 16), torch.bfloat16),
    }
    assert torch.equal(unpack_eights(layer.weight), torch.cat([m["weight"] for m in members]))
    assert torch.equal(layer.left_trans, members[0]["left_trans"].t().to(torch.bfloat16))
    assert layer.left_trans.is_contiguous()


@pytest.mark.parametrize("has_right", [True, False])
def test_the_identity_of_a_layer_with_left_trans_only_survives_a_reload(workbench: Any, has_right: bool) -> None:
    """And an explicit identity gives the same numbers."""
    stored = {**sheared(8, 4, 16, with_right=False), **({"right_trans": torch.eye(16)} if has_right else {})}
    scheme, layer = workbench.serve(FlatQuant, [stored])
    assert torch.equal(layer.right_trans, torch.eye(16))
    x = tokens_of(5, stored, torch.float32)
    torch.testing.assert_close(scheme.apply(layer, x).to(torch.float64), exact_output(x, stored), rtol=1e-6, atol=1e-6)
    again = workbench.load(scheme, [stored])
    for name, parameter in again.named_parameters():
        layer.register_parameter(name, parameter)
    left = layer.left_trans.to(torch.float32)
    weight = (stored["weight"] * stored["weight_scale"]).unflatten(1, (4, 16))
    torch.testing.assert_close(scheme.dequantize(layer), (left @ weight).flatten(1))
    scheme.process_weights_after_loading(layer)
    torch.testing.assert_close(scheme.apply(layer, x).to(torch.float64), exact_output(x, stored), rtol=1e-6, atol=1e-6)


def test_other_clip_ratios_after_a_reload_are_an_error(workbench: Any) -> None:
    """They are constants of compiled code."""
    members = [sheared(8, 4, 8, ratio) for ratio in RATIOS]
    scheme, _ = workbench.serve(FlatQuant, members)
    scheme.process_weights_after_loading(workbench.load(scheme, members))
    with pytest.raises(LimitError, match=r"layers\.0\.proj: the reloaded weights have other clip ratios") as raised:
        scheme.process_weights_after_loading(workbench.load(scheme, members[::-1]))
    assert "m0.clip_ratio, m1.clip_ratio, m2.clip_ratio" in str(raised.value)
    assert "start the engine anew" in str(raised.value)


def test_ratios_that_come_later_are_read_at_each_call(workbench: Any, compile_afresh: Callable[..., Any]) -> None:
    """Compiled with the made-up ones, and run with others, bit by bit as a layer that began with these."""
    x = tokens_of(9, sheared(8, 6, 16), torch.float32)

    def members(*ratios: float) -> list[dict[str, Tensor]]:
        return [sheared(out, 6, 16, ratio) for out, ratio in zip((24, 8, 8), ratios, strict=True)]

    begun = members(1.0, 1.0, 1.0)
    context = replace(workbench.context(begun, scheme_class=FlatQuant), values_later=True)
    scheme = FlatQuant.create(context)
    layer = workbench.load(scheme, begun)
    scheme.process_weights_after_loading(layer)
    compiled = compile_afresh(lambda x: scheme.apply(layer, x), backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ratios in ((1.0, 1.0, 1.0), RATIOS, (0.5, 0.5, 0.9), (1.0, 1.0, 1.0)):
            real = members(*ratios)
            again = workbench.load(scheme, real)
            scheme.process_weights_after_loading(again)
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(again.get_parameter(name))
            fresh, expected = workbench.serve(FlatQuant, real)
            assert torch.equal(compiled(x), fresh.apply(expected, x))
            assert torch.equal(scheme.apply(layer, x), fresh.apply(expected, x))


def test_members_with_different_matrices_are_an_error(workbench: Any) -> None:
    members = [sheared(8, 4, 8), {**sheared(8, 4, 8), "left_trans": torch.eye(4)}]
    scheme = FlatQuant.create(workbench.context(members, scheme_class=FlatQuant))
    declared = linear_params(scheme)
    assert declared["left_trans"][0].shared
    assert declared["right_trans"][0].shared
    assert not declared["clip_ratio"][0].shared
    with pytest.raises(LoadError, match="must store the same left_trans") as raised:
        check_shared(scheme.context, "left_trans", torch.stack([m["left_trans"] for m in members]))
    assert "m1.left_trans" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("weight", torch.tensor([[8, -9, 7]], dtype=torch.int8), "2 of 3 values are not int4 values from -8 to 7"),
        ("weight_offset", torch.tensor([1.0]), "the type is symmetric"),
        ("weight_scale", torch.tensor([0.0]), "not finite and positive"),
        ("left_trans", torch.tensor([torch.nan]), "not finite"),
        ("clip_ratio", torch.tensor([3.9]), "above 1"),
    ],
)
def test_values_that_cannot_be_used(workbench: Any, name: str, value: Tensor, found: str) -> None:
    scheme = FlatQuant.create(workbench.context([sheared(8, 4, 8)], scheme_class=FlatQuant))
    with pytest.raises(LoadError, match=found):
        check_values("layers.0.proj", [f"m0.{name}"], linear_params(scheme)[name][0], value)


def test_a_k_that_is_not_a_multiple_of_8_is_named(workbench: Any) -> None:
    scheme = FlatQuant.create(workbench.context([sheared(8, 4, 8)], scheme_class=FlatQuant))
    with pytest.raises(ValueError, match="100 input features cannot be packed as int4"):
        scheme.get_weight(100, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="12 input features cannot be packed as int4"):
        pack_int4_weights(torch.zeros(8, 12, dtype=torch.int8))
    (reason,) = FlatQuant.can_serve(
        workbench.context([{"weight": torch.zeros(8, 100, dtype=torch.int8)}], scheme_class=FlatQuant)
    )
    assert reason == "100 input features are not a multiple of 8, as int4 packing wants"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (8, 12, "right_trans of 12 is not a multiple of 8, as int4 packing wants"),
        (257, 8, "the operator takes matrices of up to 256, these are of 257 and 8"),
        (2, 264, "the operator takes matrices of up to 256, these are of 2 and 264"),
    ],
)
def test_sizes_that_the_operator_does_not_take(workbench: Any, left: int, right: int, reason: str) -> None:
    assert FlatQuant.can_serve(workbench.context([sheared(8, left, right)], scheme_class=FlatQuant)) == [reason]


def test_a_row_parallel_layer_is_refused_before_a_weight_is_read(workbench: Any) -> None:
    stored = sheared(8, 4, 16, with_right=False)
    (reason,) = FlatQuant.can_serve(
        workbench.context([stored], partition=Partition("row", 0, 4), scheme_class=FlatQuant)
    )
    assert reason.endswith("4 tensor-parallel ranks: use tensor_parallel_size 1")


def test_a_310p_lacks_the_operators(workbench: Any) -> None:
    with planned_device("310P"):
        (reason,) = FlatQuant.can_serve(workbench.context([sheared(8, 4, 8)], scheme_class=FlatQuant))
    assert reason == "needs one of the devices 910B, 910C, 950, cpu, this one is 310P"


def test_an_input_of_another_size_names_the_three_numbers(workbench: Any) -> None:
    scheme, layer = workbench.serve(FlatQuant, [sheared(8, 4, 8)])
    with pytest.raises(ValueError, match="transform 4 · 8 features, the input has 40"):
        scheme.apply(layer, torch.zeros(3, 40))


def test_the_usual_form_is_declared_while_there_are_no_files(workbench: Any) -> None:
    context = workbench.context([sheared(8, 16, 24)], dtype=torch.bfloat16)
    scheme = FlatQuant.create(type(context)(**{**vars(context), "stored": ()}))
    assert {name: (p.shape, p.dtype) for name, (p,) in linear_params(scheme).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sheared(8, 16, 24).items()
    }
    assert get_decompose_dim(384) == (16, 24)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**30))
def test_weights_are_packed_along_k(rows: int, packs: int, seed: int) -> None:
    weight = torch.randint(-8, 8, (rows, 8 * packs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4_weights(weight)
    assert (packed.shape, packed.dtype) == ((rows, packs), torch.int32)
    places = torch.arange(8, dtype=torch.int32) * 4
    nibbles = (packed[..., None] >> places) & 15
    assert torch.equal(torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(1), weight.to(torch.int32))


def test_more_rows_than_are_packed_at_a_time() -> None:
    weight = torch.randint(-8, 8, (600, 16), dtype=torch.int8)
    assert torch.equal(unpack_eights(pack_int4_weights(weight)), weight)
    assert pack_int4_weights(weight[:0]).shape == (0, 2)


def test_no_tokens() -> None:
    codes, scales = batched_kronecker_quant(torch.zeros(0, 4, 8), torch.eye(4), torch.eye(8), 0.98)
    assert (codes.shape, scales.shape) == ((0, 4, 1), (0,))


@settings(max_examples=40)
@given(st.integers(0, 2**30), st.integers(1, 9), st.sampled_from([24, 32, 120]))
def test_quantising_loses_half_a_step(workbench: Any, seed: int, rows: int, columns: int) -> None:
    """And what it returns is what is declared."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    context = workbench.context([{"weight": torch.zeros(rows, columns, dtype=torch.int8)}])
    stored = FlatQuant.create(type(context)(**{**vars(context), "stored": ()})).quantize(weight)
    scheme = FlatQuant.create(workbench.context([stored], scheme_class=FlatQuant))
    dequantized = scheme.dequantize(workbench.load(scheme, [stored]))
    assert bool(((dequantized - weight).abs() <= stored["weight_scale"] * (0.5 + 1e-5)).all())


@settings(max_examples=30)
@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**30))
def test_column_parallel_outputs_are_those_of_one_rank(
    workbench: Any, size: int, outputs: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    members = [sheared(n * size, 3, 8, ratio) for n, ratio in zip(outputs, RATIOS, strict=False)]
    x = tokens_of(5, members[0], torch.float32)
    scheme, layer = workbench.serve(FlatQuant, members)
    parts = workbench.run_ranks(FlatQuant, members, x, "column", size)
    torch.testing.assert_close(parts, scheme.apply(layer, x), rtol=1e-6, atol=0)
