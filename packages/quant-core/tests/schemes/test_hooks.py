"""Hooks in vllm-ascend's style, which return plain tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core import AscendLinearScheme, LinearContext, LoadError, Param, Partition, RegistrationError, Shard
from quant_core.schemes.handover import check_shared
from quant_core.schemes.hooks import call_hook
from quant_core.schemes.verify import absent_params, linear_params, verify_stored

F32 = torch.float32


class OlderStyle(AscendLinearScheme):
    """int4 pairs packed along the output, scales per group, one scale and zero point for the activations."""

    def __init__(self) -> None:
        self.group_size = 16
        self.sizes: list[tuple[int, int]] = []

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        self.sizes.append((input_size, output_size))
        packed = torch.empty(output_size // 2, input_size, dtype=torch.int8)
        return {"weight": packed, "_packed_dim": 0, "_packed_factor": 2}

    def get_pertensor_param(self, params_dtype: torch.dtype) -> dict[str, Any]:
        return {"input_scale": torch.empty(1, dtype=params_dtype), "input_offset": torch.empty(1, dtype=torch.int8)}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        return {"weight_scale": torch.empty(output_size, 1, dtype=params_dtype)}

    def get_pergroup_param(
        self, input_size: int, output_size: int, params_dtype: torch.dtype, layer_type: str | None = None
    ) -> dict[str, Any]:
        width = 16 if layer_type == "row" else 1
        return {
            "weight_scale_second": torch.empty(output_size, input_size // self.group_size, dtype=params_dtype),
            "scale_bias": torch.empty(output_size, width, dtype=F32),
        }

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.transpose(0, 1).contiguous()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, tp_rank: int = 0) -> Tensor:
        raise NotImplementedError


def member(rows: int, **other: Tensor) -> dict[str, Tensor]:
    """What a file stores for it: float32 scales, and a floating zero point."""
    return {
        "weight": torch.ones(rows // 2, 64, dtype=torch.int8),
        "weight_scale": torch.full((rows, 1), 0.5),
        "weight_scale_second": torch.full((rows, 4), 0.25),
        "input_scale": torch.tensor([2.0]),
        "input_offset": torch.tensor([-3.0]),
        **other,
    }


def context(workbench: Any, *members: dict[str, Tensor], partition: Partition | None = None) -> LinearContext:
    """The layer of these members in bfloat16; the weight's rows are packed, so sizes come from the scale."""
    partition = partition or Partition()
    parts = partition.size if partition.kind == "column" else 1
    rows = [len(m["weight_scale"]) for m in members]
    return LinearContext(
        name="proj",
        shards=tuple(Shard(f"m{i}", n, n // parts) for i, n in enumerate(rows)),
        input_size=64,
        params_dtype=torch.bfloat16,
        stored=tuple(workbench.form(f"m{i}", m) for i, m in enumerate(members)),
        partition=partition,
    )


def test_layout_follows_from_the_hook_and_the_sizes() -> None:
    """Axes by custom, steps by what is smaller than the layer; control entries are no tensors."""
    weight = call_hook(OlderStyle().get_weight, (64, 32, F32), (64, 32), False)
    assert weight == {"weight": Param((16, 64), torch.int8, output_dim=0, input_dim=1, output_step=2)}
    groups = call_hook(OlderStyle().get_pergroup_param, (64, 32, F32), (64, 32), True)
    assert groups["weight_scale_second"] == Param((32, 4), F32, output_dim=0, input_dim=1, input_step=16, plain=True)
    assert (groups["scale_bias"].shape, groups["scale_bias"].input_step) == ((32, 16), 4)
    scalar = call_hook(OlderStyle().get_pertensor_param, (F32,), (64, 32), False)["input_scale"]
    assert (scalar.shape, scalar.shared, scalar.output_dim) == ((1,), True, None)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("rank", [0, 1])
def test_loaded_cut_and_handed_over(workbench: Any, kind: Any, rank: int) -> None:
    """Fused, cut and converted; a tensor that the files lack is zeros and no parameter."""
    members = [member(32), member(16)] if kind == "column" else [member(32)]
    scheme = OlderStyle.create(context(workbench, *members, partition=Partition(kind, rank, 2)))
    verify_stored(scheme)
    assert set(absent_params(scheme)) == {"scale_bias"}
    layer = workbench.load(scheme, members)
    rows, columns = (24, 64) if kind == "column" else (32, 32)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "weight": ((rows // 2, columns), torch.int8),
        "input_scale": ((1,), torch.bfloat16),
        "input_offset": ((1,), torch.int8),
        "weight_scale": ((rows, 1), torch.bfloat16),
        "weight_scale_second": ((rows, columns // 16), torch.bfloat16),
    }
    assert (layer.input_scale.item(), layer.input_offset.item()) == (2.0, -3)
    assert torch.equal(layer.scale_bias, torch.zeros(rows, 1 if kind == "column" else 8))


def test_what_a_plain_hook_cannot_take(workbench: Any) -> None:
    """Other shapes, a weight in another dtype or absent, integers for floats."""
    bad = member(32, weight=torch.ones(16, 64), weight_scale=torch.ones(32, 1, dtype=torch.int64))
    with pytest.raises(LoadError, match=r"m0\.weight in .* float32 \[16, 64\], expected int8") as caught:
        verify_stored(OlderStyle.create(context(workbench, bad)))
    assert "m0.weight_scale in model.safetensors is int64 [32, 1]" in str(caught.value)
    lacking = member(32)
    del lacking["weight"]
    with pytest.raises(LoadError, match="weight is absent"):
        verify_stored(OlderStyle.create(context(workbench, lacking)))


def test_members_must_share_what_is_shared(workbench: Any) -> None:
    layer = context(workbench, member(32), member(16), member(16))
    check_shared(layer, "input_scale", torch.ones(3, 1))
    with pytest.raises(LoadError, match=r"m1\.input_scale") as caught:
        check_shared(layer, "input_scale", torch.tensor([[1.0], [2.0], [1.0]]))
    assert "m2" not in str(caught.value)


def test_a_hook_that_returns_something_else() -> None:
    class Wrong(OlderStyle):
        def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
            return {"weight_scale": [1.0]}

    with pytest.raises(RegistrationError, match=r"Wrong\.get_perchannel_param returns 'weight_scale' as list"):
        Wrong.create(LinearContext(name="a", shards=(Shard("a", 8, 8),), input_size=8, params_dtype=F32)).params(8, 8)


def test_new_style_declarations_pass_through(workbench: Any) -> None:
    """A hook that returns `Param` is not touched, and is never lacking."""
    from quant_core import require_scheme_class

    scheme = require_scheme_class("W8A8_DYNAMIC", "linear")
    assert issubclass(scheme, AscendLinearScheme)
    made = scheme.create(LinearContext(name="a", shards=(Shard("a", 8, 8),), input_size=8, params_dtype=F32))
    assert not any(param.plain for params in linear_params(made).values() for param in params)
