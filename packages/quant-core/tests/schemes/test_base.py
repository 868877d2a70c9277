"""The base classes, and the example in their documentation."""

import textwrap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core import (
    AscendAttentionScheme,
    AscendLinearScheme,
    AscendMoEScheme,
    Packing,
    Param,
    StoredForm,
    StoredTensor,
    WeightForm,
)
from quant_core.devices import planned_device
from quant_core.schemes import base, registry


def test_the_documented_example_is_a_working_scheme(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed as it stands in the docstring."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    lines = base.__doc__.split("\n")
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    scheme_class = registry.require_scheme_class("W8A8_EXAMPLE", "linear")
    assert scheme_class is names["AscendW8A8ExampleLinearMethod"]

    stored = {"weight": torch.randint(-128, 128, (6, 32), dtype=torch.int8), "weight_scale": torch.rand(6, 1) / 100}
    scheme, layer = workbench.serve(scheme_class, [stored, stored])
    x, bias = torch.randn(5, 32), torch.randn(12)
    weight = (stored["weight"].to(torch.float64) * stored["weight_scale"]).repeat(2, 1)
    exact = x.to(torch.float64) @ weight.t() + bias
    # Rounding x by half a step of max|x| / 127.
    tolerance = x.abs().amax(1, keepdim=True) / 127 / 2 * weight.abs().sum(1) + 1e-5
    assert bool(((scheme.apply(layer, x, bias) - exact).abs() <= tolerance).all())


class Small(AscendLinearScheme):
    """Declares one parameter of each hook, and runs on one device."""

    supported_devices = ("910B",)

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"weight": Param((output_size, input_size), params_dtype, output_dim=0, input_dim=1)}

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"clip": Param((1,), params_dtype)}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"scale": Param((output_size, 1), params_dtype, output_dim=0)}

    def get_pergroup_param(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Param]:
        return {"group_scale": Param((output_size, input_size // 8), params_dtype, output_dim=0)}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        return x


@pytest.fixture
def small(workbench: Any) -> Small:
    """An instance."""
    return Small.create(workbench.context([{"weight": torch.zeros(4, 16)}], dtype=torch.bfloat16, scheme_class=Small))


def test_the_hooks_are_asked_with_the_model_s_dtype(small: Small) -> None:
    assert {name: (p.shape, p.dtype) for name, p in small.params(16, 4).items()} == {
        "weight": ((4, 16), torch.bfloat16),
        "clip": ((1,), torch.bfloat16),
        "scale": ((4, 1), torch.bfloat16),
        "group_scale": ((4, 2), torch.bfloat16),
    }


def test_an_instance_belongs_to_one_layer(small: Small, workbench: Any) -> None:
    other = Small.create(workbench.context([{"weight": torch.zeros(8, 32)}], scheme_class=Small))
    assert small.context.input_size == 16
    assert other.context.input_size == 32
    assert "context" not in vars(Small)


def test_a_device_that_is_not_supported_is_a_reason(small: Small) -> None:
    with planned_device("910B"):
        assert Small.can_serve(small.context) == []
    with planned_device("310P"):
        assert Small.can_serve(small.context) == ["needs one of the devices 910B, this one is 310P"]


def test_optional_hooks_say_what_they_lack(small: Small) -> None:
    small.process_weights_after_loading(nn.Module())
    with pytest.raises(NotImplementedError, match="Small has no dequantize"):
        small.dequantize(nn.Module())
    with pytest.raises(NotImplementedError, match="Small needs calibration"):
        small.quantize(torch.zeros(1, 1))


def test_sizes_of_a_stored_module() -> None:
    matrix = StoredForm("m", {"weight": StoredTensor("m.weight", (4, 16), torch.int8, "f")})
    vector = StoredForm("m", {"weight": StoredTensor("m.weight", (4,), torch.int8, "f")})
    assert matrix.sizes() == (16, 4)
    assert vector.sizes() is None
    assert StoredForm("m").sizes() is None
    assert replace(matrix, weight=WeightForm(num_bits=4, packing=Packing(0))).sizes() == (16, 8)
    assert replace(matrix, weight=WeightForm(num_bits=4, packing=Packing(1, values=8))).sizes() == (128, 4)


@pytest.mark.parametrize("kind", [AscendLinearScheme, AscendMoEScheme, AscendAttentionScheme])
def test_what_a_scheme_must_define_is_asked_for(kind: type) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()
