"""W4A4_DYNAMIC: int4 activations with scales per token."""

from typing import Any

import pytest
import torch
from bits import unpack_eights
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import w4a4_dynamic
from torch import Tensor

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.linear.w4a4_dynamic import AscendW4A4DynamicLinearMethod as Scheme

INPUTS = 72
DEVICES = ["cpu", "910B"]


def exact_output(x: Tensor, stored: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """(a qᵀ) · x_scale · weight_scale + bias in float64, group by group."""
    values = x.to(torch.float64)
    scale = values.abs().amax(-1, keepdim=True) / 7
    codes = torch.where(scale > 0, torch.round(values / scale), 0)
    weight_scale = stored["weight_scale"].to(torch.float64)
    weight = stored["weight"].to(torch.float64) * weight_scale.repeat_interleave(
        x.shape[-1] // weight_scale.shape[1], 1
    )
    y = codes @ weight.t() * scale
    return y if bias is None else y + bias.to(torch.float64)


def exact_codes_input(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs that are small multiples of each row's scale, which is a power of two: no code depends on rounding."""
    codes = torch.randint(-7, 8, (tokens, inputs))
    codes[:, 0] = 7
    return (codes * 2.0 ** torch.randint(-6, 3, (tokens, 1))).to(dtype)


def serve(workbench: Any, device: str, members: list[dict[str, Tensor]], **options: Any) -> Any:
    """A scheme and its layer in the run-time form of a device."""
    with planned_device(device):
        return workbench.serve(Scheme, members, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula(workbench: Any, device: str, dtype: torch.dtype, groups: int, bias: bool) -> None:
    stored = w4a4_dynamic(24, INPUTS, groups, model=torch.bfloat16)
    scheme, layer = serve(workbench, device, [stored], dtype=dtype)
    x, added = exact_codes_input(9, INPUTS, dtype), torch.randn(24).to(dtype) if bias else None
    exact = exact_output(x, stored, added)
    torch.testing.assert_close(
        scheme.apply(layer, x, added).double(), exact, rtol=torch.finfo(dtype).eps / 2 + 2**-20, atol=1e-4
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 33000])
def test_any_number_of_tokens_and_zero_rows(workbench: Any, device: str, tokens: int) -> None:
    stored = w4a4_dynamic(8, 16)
    scheme, layer = serve(workbench, device, [stored])
    x = exact_codes_input(tokens, 16)
    x[::3] = 0
    got = scheme.apply(layer, x)
    assert not got[::3].any()
    torch.testing.assert_close(got.double(), exact_output(x, stored), rtol=1e-5, atol=1e-5)


def test_the_int8_form_has_the_codes_of_the_int4_operator(workbench: Any) -> None:
    """Also where rounding decides: both divide by the same scale."""
    stored, x = w4a4_dynamic(24, INPUTS), torch.randn(50, INPUTS)
    outputs = [scheme.apply(layer, x) for scheme, layer in (serve(workbench, d, [stored]) for d in DEVICES)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("product", "out", "inputs", "groups", "packed"),
    [
        ("910B", 24, 72, 1, True),
        ("910C", 24, 72, 1, True),
        ("950", 24, 72, 1, False),
        ("cpu", 24, 72, 1, False),
        ("910B", 12, 72, 1, False),
        ("910B", 24, 76, 1, False),
        ("910B", 24, 72, 3, False),
    ],
)
def test_the_run_time_form(workbench: Any, product: str, out: int, inputs: int, groups: int, packed: bool) -> None:
    """int4 where the product's operator takes it, and always the same output."""
    stored = w4a4_dynamic(out, inputs, groups)
    scheme, layer = serve(workbench, product, [stored], dtype=torch.bfloat16)
    assert layer.weight.dtype == (torch.int32 if packed else torch.int8)
    assert torch.equal(unpack_eights(layer.weight) if packed else layer.weight, stored["weight"].t())
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}
    x = exact_codes_input(3, inputs, torch.bfloat16)
    torch.testing.assert_close(scheme.apply(layer, x).double(), exact_output(x, stored), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_exact_tensor_parallel_quantises_as_one_rank(
    workbench: Any, device: str, dtype: torch.dtype, tokens: int, compile_afresh: Any
) -> None:
    """The ranks' slices differ thousandfold in size, so that scales of their own would give something else."""
    stored, size, inputs = w4a4_dynamic(24, 64), 4, 64
    x = exact_codes_input(tokens, inputs, dtype)
    x[:, inputs // size :] /= 4  # the largest magnitude is in the first slice
    x[2:3] = 0
    scheme, layer = serve(workbench, device, [stored], dtype=dtype)
    whole, parts = scheme.apply(layer, x), x.chunk(size, -1)
    peaks = torch.stack([part.abs().amax(-1).to(torch.float32) for part in parts])
    outputs = []
    for rank, part in enumerate(parts):
        partition = Partition("row", rank, size, lambda own, rank=rank: peaks.amax(0).where(own == peaks[rank], -1))
        scheme, layer = serve(workbench, device, [stored], dtype=dtype, partition=partition)
        outputs.append(scheme.apply(layer, part, tp_rank=rank).float())
        compiled = compile_afresh(lambda x, s=scheme, y=layer: s.apply(y, x), backend="aot_eager")
        assert torch.equal(compiled(part).float(), outputs[-1])
    torch.testing.assert_close(
        sum(outputs), whole.float(), rtol=torch.finfo(dtype).eps * size, atol=whole.abs().sum().item() / 1e4
    )
    assert not sum(outputs)[2:3].any()


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3))


@settings(max_examples=40)
@given(SHAPES, st.booleans(), st.sampled_from(DEVICES), st.integers(0, 2**30))
def test_tensor_parallel_outputs(
    workbench: Any, shape: tuple[int, list[int], int], grouped: bool, device: str, seed: int
) -> None:
    """Exactly one rank's side by side; a row-parallel rank quantises its slice with a scale of its own."""
    torch.manual_seed(seed)
    size, outputs, length = shape
    width = 8 * length
    members = [w4a4_dynamic(n * size, width * size, 2 * size if grouped else 1) for n in outputs]
    x = torch.cat([exact_codes_input(3, width) for _ in range(size)], dim=-1)
    scheme, layer = serve(workbench, device, members)
    with planned_device(device):
        columns = workbench.run_ranks(Scheme, members, x, "column", size)
        summed = workbench.run_ranks(Scheme, members, x, "row", size)
    torch.testing.assert_close(columns, scheme.apply(layer, x), rtol=1e-6, atol=1e-5)
    # These slices have exact codes of their own, so the sum is the float layer's output.
    weight = torch.cat(
        [
            m["weight"] * m["weight_scale"].repeat_interleave(m["weight"].shape[1] // m["weight_scale"].shape[1], 1)
            for m in members
        ]
    )
    torch.testing.assert_close(summed.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-3)


def test_a_cut_through_a_group_names_a_size_that_works(workbench: Any) -> None:
    with pytest.raises(LimitError, match="use tensor_parallel_size 3"):
        workbench.serve(Scheme, [w4a4_dynamic(8, 96, 6)], partition=Partition("row", 0, 4))


def test_values_beyond_int4_are_refused(workbench: Any) -> None:
    scheme = Scheme.create(workbench.context([w4a4_dynamic(8, INPUTS)], scheme_class=Scheme))
    check = scheme.params(INPUTS, 8)["weight"].check
    assert check is not None
    assert check(torch.tensor([[-8, 7]], dtype=torch.int8)) is None
    assert check(torch.tensor([[-9, 7]], dtype=torch.int8)) == (
        "1 of 2 values are not int4 values from -8 to 7, for example -9"
    )
    offset = scheme.params(INPUTS, 8)["weight_offset"].check
    assert offset is not None
    assert "symmetric" in str(offset(torch.ones(8, 1)))


@given(st.integers(0, 2**30), st.integers(1, 9), st.integers(1, 4), st.integers(1, 12))
def test_quantising_loses_half_a_step(workbench: Any, seed: int, rows: int, groups: int, length: int) -> None:
    """And what it returns is what is declared."""
    weight = torch.randn(rows, groups * length, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    scheme = Scheme.create(workbench.context([w4a4_dynamic(rows, groups * length, groups)], scheme_class=Scheme))
    stored = scheme.quantize(weight)
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    error = (scheme.dequantize(layer) - weight).abs()
    assert bool((error <= stored["weight_scale"].repeat_interleave(length, 1) * (0.5 + 1e-5)).all())
    assert not scheme.dequantize(layer)[0].any()
