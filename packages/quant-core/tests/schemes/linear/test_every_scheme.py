"""What holds for every linear scheme in every form that checkpoints have."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import CASES
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from quant_core import Partition, list_schemes
from quant_core.schemes.handover import hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.verify import linear_params, verify_stored

SIZES, INPUTS = (24, 8, 8), 64


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of what a layer holds."""
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def class_state(scheme: type) -> dict[Any, Any]:
    """A copy of what the class and its bases hold, down into containers; functions and classes stand for themselves."""
    held = {(owner, name): value for owner in scheme.__mro__[:-1] for name, value in vars(owner).items()}
    own = {key: value for key, value in held.items() if not key[1].startswith(("__", "_abc"))}
    plain = {key for key, value in own.items() if not hasattr(value, "__get__") and not isinstance(value, type)}
    return {key: copy.deepcopy(value) if key in plain else value for key, value in own.items()}


def reload(scheme: Any, layer: nn.Module, stored: nn.Module) -> None:
    """As an engine does: the stored parameters take the place of the processed ones, and are processed again."""
    for name in list(layer._parameters):
        delattr(layer, name)
    for name, value in stored.named_parameters():
        replace_parameter(layer, name, value.detach().clone())
    scheme.process_weights_after_loading(layer)


def test_every_built_in_scheme_has_a_case() -> None:
    built_in = {
        c for (_, kind), c in list_schemes().items() if kind == "linear" and c.__module__.startswith("quant_core")
    }
    assert {case.scheme for case in CASES.values()} == built_in, "a new type needs cases in support/linear_cases.py"


def test_what_is_declared_is_what_is_stored(case: Any, workbench: Any) -> None:
    members = case.members(SIZES, INPUTS)
    scheme = case.scheme.create(workbench.context(members, case.dtype, scheme_class=case.scheme))
    assert case.scheme.can_serve(scheme.context) == []
    verify_stored(scheme)
    for name, params in linear_params(scheme).items():
        for member, param in zip(members, params, strict=True):
            assert param.check is None or param.check(member[name]) is None
    assert scheme.context.form.sizes() == (INPUTS, SIZES[0])


@pytest.mark.usefixtures("each_gemm")
def test_the_output_is_near_that_of_the_dequantised_weight(case: Any, workbench: Any) -> None:
    """`dequantize` is for humans and tools; the exact formulas are in each type's own test."""
    members = case.members(SIZES, INPUTS)
    scheme = case.scheme.create(workbench.context(members, case.dtype, scheme_class=case.scheme))
    layer = workbench.load(scheme, members)
    weight = scheme.dequantize(layer)
    assert (weight.shape, weight.dtype) == ((sum(SIZES), INPUTS), torch.float32)
    scheme.process_weights_after_loading(layer)
    x = torch.randn(2, 5, INPUTS).clamp(-2, 2).to(case.dtype)  # within what the static type's input scales reach
    y = scheme.apply(layer, x).to(torch.float64) - scheme.apply(layer, torch.zeros_like(x)).to(torch.float64)
    exact = x.to(torch.float64) @ weight.to(torch.float64).t()
    assert (y - exact).norm() / exact.norm() < case.error


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (2, 3), (2, 0), (1, 1, 4)])
def test_shapes_and_dtype(case: Any, workbench: Any, shape: tuple[int, ...]) -> None:
    scheme, layer = workbench.serve(case.scheme, case.members(SIZES, INPUTS), dtype=case.dtype)
    x = torch.randn(*shape, INPUTS).to(case.dtype)
    y = scheme.apply(layer, x)
    assert (y.shape, y.dtype) == ((*shape, sum(SIZES)), case.dtype)
    strided = torch.randn(INPUTS, *shape).to(case.dtype).movedim(0, -1)
    torch.testing.assert_close(scheme.apply(layer, strided), scheme.apply(layer, strided.contiguous()))


def test_a_reload_of_the_same_weights_changes_nothing(case: Any, workbench: Any) -> None:
    members = case.members(SIZES, INPUTS)
    scheme, layer = workbench.serve(case.scheme, members, dtype=case.dtype)
    before, x = tensors(layer), torch.randn(5, INPUTS).to(case.dtype)
    y = scheme.apply(layer, x)
    for _ in range(2):
        reload(scheme, layer, workbench.load(scheme, members))
        after = tensors(layer)
        assert before
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all((after[n].dtype, after[n].stride()) == (before[n].dtype, before[n].stride()) for n in before)
        assert torch.equal(scheme.apply(layer, x), y)


def test_processing_leaves_the_stored_tensors_as_they_were(case: Any, workbench: Any) -> None:
    """An engine may hand out views of memory that it still needs."""
    members = case.members(SIZES, INPUTS)
    scheme = case.scheme.create(workbench.context(members, case.dtype, scheme_class=case.scheme))
    layer = workbench.load(scheme, members)
    held = {name: parameter.data for name, parameter in layer.named_parameters()}
    assert held
    copies = {name: value.clone() for name, value in held.items()}
    scheme.process_weights_after_loading(layer)
    assert all(torch.equal(held[name], copies[name]) for name in held)


def test_two_layers_of_different_width_and_no_state_on_the_class(case: Any, workbench: Any) -> None:
    before = class_state(case.scheme)
    wide, narrow = case.members((48,), 128), case.members((8,), 32)
    layers = [workbench.serve(case.scheme, members, dtype=case.dtype) for members in (wide, narrow, wide)]
    inputs = [torch.randn(3, width).to(case.dtype) for width in (128, 32, 128)]
    outputs = [scheme.apply(layer, x) for (scheme, layer), x in zip(layers, inputs, strict=True)]
    again = [scheme.apply(layer, x) for (scheme, layer), x in zip(layers, inputs, strict=True)]
    assert [y.shape for y in outputs] == [(3, 48), (3, 8), (3, 48)]
    assert all(map(torch.equal, outputs, again))
    assert class_state(case.scheme) == before


def test_dummy_weights_are_served(case: Any, workbench: Any) -> None:
    """What `load_format="dummy"` fills in makes no sense, and nothing may raise."""
    members = case.members(SIZES, INPUTS)
    scheme = case.scheme.create(workbench.context(members, case.dtype, scheme_class=case.scheme))
    layer, layouts = nn.Module(), layouts_of(linear_params(scheme), scheme.context)
    for name, layout in layouts.items():
        fill = layout.param.dummy if layout.param.dummy is not None else 3
        replace_parameter(layer, name, torch.full(layout.shape, fill, dtype=layout.param.dtype))
    hand_over(layer, layouts.values(), ())
    scheme.process_weights_after_loading(layer)
    assert scheme.apply(layer, torch.randn(2, INPUTS).to(case.dtype)).shape == (2, sum(SIZES))


def test_compiled_without_a_break_it_equals_eager(
    case: Any, workbench: Any, compile_afresh: Callable[..., Any]
) -> None:
    """For any number of tokens, and after each way in which other weights come under the compiled code."""
    scheme, layer = workbench.serve(case.scheme, case.members(SIZES, INPUTS), dtype=case.dtype)
    bias = None if scheme.folds_bias else torch.randn(sum(SIZES)).to(case.dtype)
    compiled = compile_afresh(lambda x: scheme.apply(layer, x, bias), backend="aot_eager", dynamic=True)
    inputs = [torch.randn(*shape, INPUTS).to(case.dtype) for shape in ((5,), (9,), (2, 3))]
    for x in inputs:
        assert torch.equal(compiled(x), scheme.apply(layer, x, bias))
    old = compiled(inputs[0])

    # vLLM's reload copies processed tensors into those that compiled code holds.
    _, other = workbench.serve(case.scheme, case.members(SIZES, INPUTS), dtype=case.dtype)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(other.get_parameter(name).data)
    new = compiled(inputs[0])
    assert not torch.equal(new, old)
    assert torch.equal(new, scheme.apply(layer, inputs[0], bias))

    # Somebody else may leave new tensors on the layer.
    reload(scheme, layer, workbench.load(scheme, case.members(SIZES, INPUTS)))
    newer = compiled(inputs[0])
    assert not torch.equal(newer, new)
    assert torch.equal(newer, scheme.apply(layer, inputs[0], bias))


@pytest.fixture(scope="session")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where inductor finds no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        try:
            torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.randn(8))
        except InductorError as error:
            if "No working C++ compiler" not in str(error):
                raise
            pytest.skip(f"inductor does not work here: {error}")


@pytest.mark.parametrize(
    "case", ["W8A8 distinct input scales", "W8A8_DYNAMIC", "W8A16 asymmetric groups"], indirect=True
)
@pytest.mark.usefixtures("inductor")
def test_compiled_by_inductor_it_equals_eager(
    case: Any, workbench: Any, compile_afresh: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generated code checks the strides that the fake functions promise."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    scheme, layer = workbench.serve(case.scheme, case.members(SIZES, INPUTS), dtype=case.dtype)
    compiled = compile_afresh(lambda x: scheme.apply(layer, x * 2), backend="inductor")
    for x in (torch.randn(5, INPUTS, dtype=case.dtype), torch.randn(INPUTS, 5, dtype=case.dtype).t()):
        torch.testing.assert_close(compiled(x), scheme.apply(layer, x * 2))


def test_column_parallel_parts_side_by_side_are_the_whole(case: Any, workbench: Any) -> None:
    members = case.members((96, 192, 288), INPUTS)  # whole int32 of packed zero points on each rank
    x = torch.randn(5, INPUTS).to(case.dtype)
    scheme, layer = workbench.serve(case.scheme, members, dtype=case.dtype)
    whole = scheme.apply(layer, x)
    for size in (2, 3, 4):
        parts = workbench.run_ranks(case.scheme, members, x, "column", size, dtype=case.dtype)
        torch.testing.assert_close(parts, whole)


def test_a_layer_that_every_rank_holds_is_the_whole(case: Any, workbench: Any) -> None:
    members, x = case.members(SIZES, INPUTS), torch.randn(5, INPUTS).to(case.dtype)
    outputs = []
    for rank in range(3):
        partition = Partition("replicated", rank, 3)
        scheme, layer = workbench.serve(case.scheme, members, dtype=case.dtype, partition=partition)
        outputs.append(scheme.apply(layer, x, tp_rank=rank))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
