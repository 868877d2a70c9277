"""Experts of every type: what a loop over tokens, their experts and the linear layers of these experts computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from float_modules import EXPERT_MODULES, SUMMED
from integer_modules import unfolded
from linear_cases import w4a4_dynamic, w4a8_dynamic, w4a16, w8a8, w8a8_dynamic, w8a8_mix, w8a16
from mx_modules import mxfp4, mxfp8, wfp8afp8
from torch import Tensor, nn
from torch.nn import functional

from quant_core import (
    DOWN,
    GATE_UP,
    AscendMoEScheme,
    ExpertSizes,
    LayerQuant,
    LayerQuery,
    LimitError,
    LoadError,
    Partition,
    RegistrationError,
    UnsupportedSchemeError,
    create_scheme,
    get_scheme_class,
    register_scheme,
)
from quant_core.devices import planned_device
from quant_core.ops.cpu.packed import refusal
from quant_core.schemes import registry
from quant_core.schemes.context import Role
from quant_core.schemes.stacks import put

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, K = 64, 128, 5, 9, 2

Stored = dict[str, Tensor]
WHOLE = Partition()

#: How the modules of a type are made, by outputs and inputs.
MAKE: dict[str, Callable[[int, int], Stored]] = {
    "W8A8_DYNAMIC": w8a8_dynamic,
    "W8A8_DYNAMIC groups": lambda out, inputs: w8a8_dynamic(out, inputs, groups=2),
    "W8A8": w8a8,
    "W8A8 unfolded": unfolded,
    "W8A8 unfolded asymmetric": lambda out, inputs: unfolded(out, inputs, asymmetric=True),
    "W8A8 unfolded per tensor": lambda out, inputs: unfolded(out, inputs, "tensor", True, scalar=True),
    "W8A8_MIX": w8a8_mix,
    "W8A16": lambda out, inputs: w8a16(out, inputs, 1, asymmetric=True),
    "W8A16 groups": lambda out, inputs: w8a16(out, inputs, 2, asymmetric=True),
    "W4A16": lambda out, inputs: w4a16(out, inputs, 2),
    "W4A8_DYNAMIC": w4a8_dynamic,
    "W4A8_DYNAMIC groups": lambda out, inputs: w4a8_dynamic(out, inputs, 2),
    "W4A4_DYNAMIC": w4a4_dynamic,
    "W8A8_MXFP8": mxfp8,
    "W4A8_MXFP": mxfp4,
    "W4A4_MXFP4": mxfp4,
    "WFP8AFP8_DYNAMIC": wfp8afp8,
    **EXPERT_MODULES,
}


@dataclass
class Experts:
    """The stored modules of one layer, and the types of its halves."""

    gate_up: str
    down: str
    modules: dict[str, list[tuple[Stored, ...]]]
    sizes: ExpertSizes

    @classmethod
    def make(cls, gate_up: str, down: str = "", **sizes: Any) -> "Experts":
        """Random modules. Without a type of its own, down is of that of gate and up."""
        there, back = MAKE[gate_up], MAKE[down or gate_up]
        gated = not str(sizes.get("activation", "")).endswith("_no_mul")
        modules = {
            GATE_UP: [tuple(there(INTERMEDIATE, HIDDEN) for _ in range(1 + gated)) for _ in range(EXPERTS)],
            DOWN: [(back(HIDDEN, INTERMEDIATE),) for _ in range(EXPERTS)],
        }
        return cls(gate_up, down or gate_up, modules, ExpertSizes(HIDDEN, INTERMEDIATE, EXPERTS, **sizes))

    def types(self) -> dict[str, str]:
        """The quantisation type of each half."""
        return {half: name.partition(" ")[0] for half, name in ((GATE_UP, self.gate_up), (DOWN, self.down))}


def named(experts: Experts) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Names for all modules."""
    members = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
    return {
        half: tuple(
            tuple(f"experts.{index}.{member}" for member in members[half][-len(modules) :])
            for index, modules in enumerate(rows)
        )
        for half, rows in experts.modules.items()
    }


def scheme_of(
    workbench: Any,
    experts: Experts,
    partition: Partition = WHOLE,
    role: Role = "both",
    dtype: torch.dtype = torch.float32,
) -> AscendMoEScheme:
    """The scheme as a format's answer makes it."""
    names, halves = named(experts), {}
    for half, quant_type in experts.types().items():
        linear = get_scheme_class(quant_type, "linear")
        modules = tuple(name for members in names[half] for name in members)
        stored = [module for members in experts.modules[half] for module in members]
        inputs = HIDDEN if half == GATE_UP else INTERMEDIATE
        forms = tuple(workbench.form(n, m, linear, inputs) for n, m in zip(modules, stored, strict=True))
        halves[half] = LayerQuant(quant_type, modules, forms, evidence=("the test",))  # type: ignore[arg-type]
    query = LayerQuery(
        "experts",
        "moe",
        experts=names,
        sizes=experts.sizes,
        params_dtype=dtype,
        partition=partition,
        role=role,
    )
    scheme = create_scheme(query, LayerQuant("both", (), halves=halves))
    assert isinstance(scheme, AscendMoEScheme)
    return scheme


def serve(workbench: Any, experts: Experts, **options: Any) -> tuple[AscendMoEScheme, nn.Module]:
    """A scheme and its processed layer."""
    scheme = scheme_of(workbench, experts, **options)
    layer = nn.Module()
    local = experts.sizes.local_experts or range(EXPERTS)
    for half, linear in scheme.halves.items():
        stored = [module for index in local for module in experts.modules[half][index]]
        held = workbench.load(linear, stored)
        put(layer, half, dict(held.named_parameters()) | plain(held))
    scheme.process_weights_after_loading(layer)
    return scheme, layer


def plain(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}


def routing(tokens: int = TOKENS, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the weights of their experts, and the experts."""
    ids = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k)
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, k), ids.to(torch.int32)


def looped(
    workbench: Any,
    experts: Experts,
    routed: tuple[Tensor, Tensor, Tensor],
    activation: Callable[[Sequence[Tensor]], Tensor] = lambda parts: functional.silu(parts[0]) * parts[1],
    **options: Any,
) -> Tensor:
    """The definition, with the linear layers of each expert."""
    x, weights, ids = routed
    types = experts.types()

    def multiply(half: str, module: Stored, row: Tensor) -> Tensor:
        scheme, layer = workbench.serve(
            get_scheme_class(types[half], "linear"), [module], inputs=row.shape[1], **options
        )
        return scheme.apply(layer, row)

    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    local = experts.sizes.local_experts or tuple(range(EXPERTS))
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert not in local:
                continue
            row = x[token : token + 1]
            factor = 1.0 if experts.sizes.weight_on_input else float(weight)
            row = row * weight if experts.sizes.weight_on_input else row
            hidden = activation([multiply(GATE_UP, module, row) for module in experts.modules[GATE_UP][expert]])
            y[token] += factor * multiply(DOWN, experts.modules[DOWN][expert][0], hidden)[0].double()
    return y


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums, and for a rounding decision of one element of the quantised hidden state."""
    error = (actual.double() - expected).abs()
    scale = float(expected.abs().max()) + 1e-30
    return bool(error.median() <= 2e-6 * scale) and bool(error.max() <= 2e-2 * scale)


@pytest.mark.parametrize("kind", MAKE)
def test_a_type_computes_what_its_linear_layers_do(workbench: Any, kind: str) -> None:
    experts, routed = Experts.make(kind), routing()
    scheme, layer = serve(workbench, experts)
    actual = scheme.apply(layer, *routed)
    assert actual.dtype == torch.float32
    assert close(actual, looped(workbench, experts, routed))


@pytest.mark.parametrize("kind", ["W4A8_DYNAMIC", "W4A16", "W8A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_the_form_of_an_npu_computes_the_same(workbench: Any, kind: str) -> None:
    """Packed weights and encoded scales, multiplied by the kernels that stand in for the device's."""
    experts, routed = Experts.make(kind), routing()
    with planned_device("910B"):
        scheme, layer = serve(workbench, experts)
        actual = scheme.apply(layer, *routed)
    packed = {"W4A8_DYNAMIC": torch.int32, "W4A16": torch.int32}
    assert layer.get_parameter(f"{GATE_UP}weight").dtype == packed.get(kind, torch.int8)
    assert close(actual, looped(workbench, experts, routed))


def test_halves_of_two_types(workbench: Any) -> None:
    experts, routed = Experts.make("W8A8_DYNAMIC", "W4A8_DYNAMIC groups"), routing()
    scheme, layer = serve(workbench, experts)
    assert close(scheme.apply(layer, *routed), looped(workbench, experts, routed))
    experts = Experts.make("W8A16", "W8A8")
    scheme, layer = serve(workbench, experts)
    assert close(scheme.apply(layer, *routed), looped(workbench, experts, routed))


def test_mix_is_static_where_an_instance_only_decodes(workbench: Any) -> None:
    experts, routed = Experts.make("W8A8_MIX"), routing()
    scheme, layer = serve(workbench, experts, role="decode")
    static, dynamic = (looped(workbench, experts, routed, role=role) for role in ("decode", "both"))
    assert close(scheme.apply(layer, *routed), static)
    assert not close(static, dynamic)


ACTIVATIONS: dict[str, tuple[dict[str, Any], Callable[[Sequence[Tensor]], Tensor]]] = {
    "gelu": ({}, lambda p: functional.gelu(p[0]) * p[1]),
    "gelu_tanh": ({}, lambda p: functional.gelu(p[0], approximate="tanh") * p[1]),
    "relu2": ({}, lambda p: functional.relu(p[0]) ** 2 * p[1]),
    "relu2_no_mul": ({}, lambda p: functional.relu(p[0]) ** 2),
    "silu_no_mul": ({}, lambda p: functional.silu(p[0])),
    "silu": ({"limit": 0.5}, lambda p: functional.silu(p[0].clamp(max=0.5)) * p[1].clamp(-0.5, 0.5)),
    "swigluoai_uninterleave": (
        {"limit": 0.7, "alpha": 1.702, "beta": 1.0},
        lambda p: p[0].clamp(max=0.7) * (1.702 * p[0].clamp(max=0.7)).sigmoid() * (p[1].clamp(-0.7, 0.7) + 1),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(workbench: Any, name: str) -> None:
    limits, function = ACTIVATIONS[name]
    experts, routed = Experts.make("W8A16", activation=name, **limits), routing()
    scheme, layer = serve(workbench, experts)
    assert close(scheme.apply(layer, *routed), looped(workbench, experts, routed, function))


@pytest.mark.parametrize(("name", "limit"), [("situ", None), ("gelu", 7.0), ("swigluoai", None)])
def test_an_unknown_activation_is_refused(workbench: Any, name: str, limit: float | None) -> None:
    with pytest.raises(UnsupportedSchemeError, match=f"the activation '{name}'"):
        scheme_of(workbench, Experts.make("W8A8_DYNAMIC", activation=name, limit=limit))


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8", "W4A8_DYNAMIC groups", "W8A8_MXFP8"])
def test_ranks_of_expert_parallelism_add_up(workbench: Any, kind: str) -> None:
    """Experts that do not divide evenly, placed in order and in turns; one rank's tokens may have none of its own."""
    experts, routed = Experts.make(kind), routing()
    expected = looped(workbench, experts, routed)
    for placed in (((0, 1, 2), (3, 4)), ((0, 2, 4), (1, 3)), ((4, 0, 3, 1, 2), ())):
        total = torch.zeros(TOKENS, HIDDEN)
        for local in filter(None, placed):
            own = replace(experts, sizes=replace(experts.sizes, local_experts=local))
            scheme, layer = serve(workbench, own)
            total += scheme.apply(layer, *routed)
        assert close(total, expected)


@pytest.mark.parametrize("kind", ["W8A8", "W8A16 groups", "W4A16", "W8A8_DYNAMIC", *SUMMED])
def test_ranks_of_tensor_parallelism_add_up(workbench: Any, kind: str) -> None:
    experts, routed = Experts.make(kind), routing()
    seen: list[Tensor] = []

    def max_over_ranks(peaks: Tensor) -> Tensor:  # stands in for the other rank: both are computed one after the other
        seen.append(peaks)
        return peaks if len(seen) != 4 else torch.maximum(seen[1], peaks)

    parts = [serve(workbench, experts, partition=Partition("row", rank, 2)) for rank in range(2)]
    total = sum(scheme.apply(layer, *routed) for scheme, layer in parts)
    if kind == "W8A8_DYNAMIC":  # a scale for each rank's slice: as different as the quantisation itself
        assert not close(total, looped(workbench, experts, routed))
    else:
        assert close(total, looped(workbench, experts, routed))


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A8_DYNAMIC groups", "WFP8AFP8_DYNAMIC"])
def test_exact_tp_agrees_with_one_rank(workbench: Any, kind: str) -> None:
    """Each rank quantises its slice with the scale of the whole row."""
    experts, routed = Experts.make(kind), routing()
    peaks: list[Tensor] = []

    def note(own: Tensor) -> Tensor:
        peaks.append(own)
        return own

    def both(own: Tensor) -> Tensor:
        return torch.maximum(peaks[0], peaks[1])

    total = torch.zeros(TOKENS, HIDDEN)
    for run in (note, both):
        for rank in range(2):
            scheme, layer = serve(workbench, experts, partition=Partition("row", rank, 2, run))
            y = scheme.apply(layer, *routed)
            total += y if run is both else 0
    assert close(total, looped(workbench, experts, routed))


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8", "W4A16"])
def test_uneven_choices(workbench: Any, kind: str) -> None:
    """No token, one expert for all tokens, choices of nobody, one choice."""
    experts = Experts.make(kind)
    scheme, layer = serve(workbench, experts)
    assert scheme.apply(layer, *routing(0)).shape == (0, HIDDEN)
    x, weights, _ = routing()
    for ids in (torch.full((TOKENS, 1), 3), torch.full((TOKENS, 1), -1), torch.tensor([[0, -1]] * TOKENS)):
        routed = x, weights[:, : ids.shape[1]].contiguous(), ids.to(torch.int32)
        assert close(scheme.apply(layer, *routed), looped(workbench, experts, routed))


def test_the_weight_may_belong_to_the_input(workbench: Any) -> None:
    experts, (x, weights, ids) = Experts.make("W8A8_DYNAMIC", weight_on_input=True), routing(k=1)
    scheme, layer = serve(workbench, experts)
    before = weights.clone()
    assert close(scheme.apply(layer, x, weights, ids), looped(workbench, experts, (x, weights, ids)))
    assert torch.equal(weights, before)


def test_nan_in_one_token_stays_there(workbench: Any) -> None:
    experts, (x, weights, ids) = Experts.make("W8A16"), routing()
    scheme, layer = serve(workbench, replace(experts, sizes=replace(experts.sizes, local_experts=(1, 3))))
    expected = scheme.apply(layer, x, weights, ids)
    x[0] = torch.nan
    ids[0] = torch.tensor([1, 3])
    actual = scheme.apply(layer, x, weights, ids)
    assert bool(actual[0].isnan().all())
    assert close(actual[1:], expected[1:].double())


def test_processing_again_gives_the_same(workbench: Any) -> None:
    """As after a reload."""
    experts, routed = Experts.make("W4A8_DYNAMIC"), routing()
    scheme, layer = serve(workbench, experts)
    first = scheme.apply(layer, *routed)
    again, other = serve(workbench, experts)
    assert torch.equal(again.apply(other, *routed), first)


def loaded(workbench: Any, experts: Experts) -> tuple[AscendMoEScheme, nn.Module]:
    """A scheme and its layer as it is loaded."""
    scheme, layer = scheme_of(workbench, experts), nn.Module()
    for half, linear in scheme.halves.items():
        held = workbench.load(linear, [module for members in experts.modules[half] for module in members])
        put(layer, half, {name: param.data for name, param in held.named_parameters()})
    return scheme, layer


def test_int8_weights_are_not_copied(workbench: Any) -> None:
    """Where they are not packed, the run-time form is a view of what was loaded."""
    with planned_device("910B"):
        scheme, layer = loaded(workbench, Experts.make("W8A8_DYNAMIC"))
        before = layer.get_parameter(f"{GATE_UP}weight").data_ptr()
        scheme.process_weights_after_loading(layer)
    weight = layer.get_parameter(f"{GATE_UP}weight")
    assert weight.shape == (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    assert weight.data_ptr() == before


def test_packed_weights_take_the_place_of_plain_ones(workbench: Any) -> None:
    """To the last bit, and a reload packs again."""
    experts, routed = Experts.make("W8A8_DYNAMIC"), routing()
    scheme, layer = loaded(workbench, experts)
    scheme.process_weights_after_loading(layer)
    assert hasattr(layer, f"{GATE_UP}weight") == (refusal() is not None)
    with planned_device("910B"):
        plain_scheme, plain_layer = loaded(workbench, experts)
        plain_scheme.process_weights_after_loading(plain_layer)
        expected = plain_scheme.apply(plain_layer, *routed)
    assert torch.equal(scheme.apply(layer, *routed), expected)
    for half, linear in scheme.halves.items():
        held = workbench.load(
            linear, [{**m, "weight": -m["weight"].clamp(-127)} for e in experts.modules[half] for m in e]
        )
        put(layer, half, {name: param.data for name, param in held.named_parameters()})
    scheme.process_weights_after_loading(layer)
    assert not torch.equal(scheme.apply(layer, *routed), expected)


@pytest.mark.parametrize(("kind", "name"), [("W8A8", "input_scale"), ("WFP8AFP8", "input_scale")])
def test_gate_and_up_with_scales_of_their_own_are_refused(workbench: Any, kind: str, name: str) -> None:
    experts = Experts.make(kind)
    up = experts.modules[GATE_UP][2][1]
    up[name] = up[name] * 2
    with pytest.raises(LimitError, match=rf"experts\.2\.gate_proj\.{name} and experts\.2\.up_proj\.{name}"):
        serve(workbench, experts)


def test_a_wrong_expert_is_named(workbench: Any) -> None:
    experts = Experts.make("W8A8_DYNAMIC")
    del experts.modules[GATE_UP][3][1]["weight_scale"]
    experts.modules[GATE_UP][4][0]["weight"] = experts.modules[GATE_UP][4][0]["weight"].t().contiguous()
    with pytest.raises(LoadError) as raised:
        scheme_of(workbench, experts)
    assert "experts.3.up_proj.weight_scale is absent" in str(raised.value)
    assert "experts.4.gate_proj.weight in model.safetensors is int8 [64, 128], expected" in str(raised.value)


def test_hooks_tell_what_this_rank_holds(workbench: Any) -> None:
    """By the names of the field."""
    scheme = scheme_of(workbench, Experts.make("W8A8_DYNAMIC"), partition=Partition("row", 0, 2))
    arguments = (EXPERTS, INTERMEDIATE // 2, HIDDEN, torch.float32)
    shapes = {name: param.shape for name, param in scheme.get_weight(*arguments).items()}
    assert shapes == {"w13_weight": (EXPERTS, INTERMEDIATE, HIDDEN), "w2_weight": (EXPERTS, HIDDEN, INTERMEDIATE // 2)}
    assert set(scheme.get_dynamic_quant_param(*arguments)) == {
        f"{half}{name}" for half in (GATE_UP, DOWN) for name in ("weight_scale", "weight_offset")
    }


def test_a_type_of_experts_says_what_a_projection_stores() -> None:
    class Unsaid(AscendMoEScheme):
        def multiply(self, layer: nn.Module, half: str, rows: Any, dtype: torch.dtype) -> Tensor:
            raise AssertionError("never asked")

    with pytest.raises(RegistrationError, match="`linear`, the scheme of a linear layer that stores the same"):
        register_scheme("W8A8_UNSAID", "moe")(Unsaid)
    assert get_scheme_class("W8A8_UNSAID", "moe") is None


def test_a_type_of_ones_own_is_a_few_lines(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another package would add it; the linear type is one that exists."""
    monkeypatch.setattr(registry, "_registry", {**registry._registry})
    monkeypatch.setitem(MAKE, "MINE", MAKE["W8A16"])

    class Mine(AscendMoEScheme):
        linear = get_scheme_class("W8A16", "linear")  # type: ignore[assignment]

        def multiply(self, layer: nn.Module, half: str, rows: Any, dtype: torch.dtype) -> Tensor:
            weight, scale = (layer.get_parameter(f"{half}{name}") for name in ("weight", "weight_scale"))
            offset = layer.get_parameter(f"{half}weight_offset")
            parts = rows.values.split([*rows.counts.tolist(), len(rows.values) - int(rows.counts.sum())])
            exact = (weight + offset) * scale
            return torch.cat([*(part @ one for part, one in zip(parts, exact, strict=False))])

    register_scheme("MINE", "moe")(Mine)
    register_scheme("MINE", "linear")(Mine.linear)
    experts, routed = Experts.make("MINE"), routing()
    scheme, layer = serve(workbench, experts)
    assert close(scheme.apply(layer, *routed), looped(workbench, experts, routed))
