"""W4A8_DYNAMIC: two stages of scales, and the operator's assist term."""

from typing import Any

import pytest
import torch
from bits import unpack_eights, unpack_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import w4a8_dynamic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LimitError, Partition
from quant_core.devices import planned_device
from quant_core.schemes.linear.w4a8_dynamic import AscendW4A8DynamicLinearMethod as Scheme
from quant_core.schemes.params import float_values
from quant_core.schemes.verify import verify_stored


def exact_weight(stored: dict[str, Tensor], inputs: int) -> Tensor:
    """q · s in float64 [out, in]."""
    weight, scale = stored["weight"], stored["weight_scale"].double()
    codes = unpack_pairs(weight, 0) if weight.shape[0] != scale.shape[0] else weight
    scale = scale * stored.get("weight_channel_scale", torch.ones(1, 1)).double()
    return codes.double() * scale.repeat_interleave(inputs // scale.shape[1], dim=1)


def exact_output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(a qᵀ) · x_scale · s + bias in float64."""
    values = x.to(torch.float64)
    scale = values.abs().amax(-1, keepdim=True) / 127
    y = torch.where(scale > 0, torch.round(values / scale), 0) * scale @ weight.t()
    return y if bias is None else y + bias.to(torch.float64)


def exact_codes_input(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs that are small multiples of each row's scale, which is a power of two: no code depends on rounding."""
    codes = torch.randint(-126, 127, (tokens, inputs))
    codes[:, 0] = 127
    return (codes * 2.0 ** torch.randint(-6, 3, (tokens, 1))).to(dtype)


def serve(workbench: Any, device: str, members: list[dict[str, Tensor]], **options: Any) -> Any:
    """A scheme and its layer in the run-time form of a device."""
    with planned_device(device):
        return workbench.serve(Scheme, members, **options)


def close(got: Tensor, exact: Tensor, loss: float = 0.0) -> None:
    """Equal up to float32 sums, one rounding to the result's dtype, and a loss relative to all outputs' norm."""
    atol = 1e-4 + loss * exact.norm().item() / max(1, exact.numel()) ** 0.5
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(got.dtype).eps + 2**-20, atol=atol)


FORMS = {
    "one stage": {},
    "one stage, unpacked": {"packed": False, "parts": 0},
    "two stages": {"groups": 3, "parts": 16},
    "two stages, unpacked": {"groups": 9, "packed": False, "parts": 0},
    "16 parts": {"parts": 16},
    "as many parts as input features": {"parts": 144},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_in_int8(workbench: Any, dtype: torch.dtype, form: str, bias: bool) -> None:
    """144 input features are no multiple of 256, so int8 it is on every device."""
    stored = w4a8_dynamic(24, 144, **FORMS[form])
    scheme, layer = serve(workbench, "910B", [stored], dtype=dtype)
    assert layer.weight.dtype == torch.int8
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}
    x, added = exact_codes_input(9, 144, dtype), torch.randn(24).to(dtype) if bias else None
    close(scheme.apply(layer, x, added), exact_output(x, exact_weight(stored, 144), added))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"groups": 1, "parts": 16}, {"parts": 768}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_in_int4(workbench: Any, dtype: torch.dtype, options: dict[str, int], bias: bool) -> None:
    """Scales lose what the operator's encoding does not hold, 2^-11; the assist term cancels whatever is left."""
    stored = w4a8_dynamic(24, 768, **options)
    scheme, layer = serve(workbench, "910B", [stored], dtype=dtype)
    assert {n: (tuple(p.shape), p.dtype) for n, p in layer.named_parameters()} == {
        "weight": ((768, 3), torch.int32),
        "weight_scale": ((3, 24), torch.int64),
        "scale_bias": ((24,), torch.float32),
    }
    weight, x = exact_weight(stored, 768), exact_codes_input(9, 768, dtype)
    assert torch.equal(unpack_eights(layer.weight), unpack_pairs(stored["weight"], 0).t())
    torch.testing.assert_close(layer.scale_bias.double(), 8 * weight.sum(1), rtol=2**-10, atol=2**-10)
    first = stored["weight_scale"] * stored.get("weight_channel_scale", torch.ones(1, 1))
    torch.testing.assert_close(float_values(layer.weight_scale), first.t().expand(3, 24), rtol=2**-11, atol=0)
    added = torch.randn(24).to(dtype) if bias else None
    close(scheme.apply(layer, x, added), exact_output(x, weight, added), 2**-10)


def test_a_stored_scale_bias_that_is_off_does_no_harm(workbench: Any) -> None:
    """Older writers compute it in 16 bits; with their number the shift of the activations would not cancel."""
    stored = w4a8_dynamic(8, 256)
    off = {**stored, "scale_bias": (stored["scale_bias"] * 1.003)}
    x = exact_codes_input(5, 256, torch.bfloat16)
    outputs = [s.apply(y, x) for s, y in (serve(workbench, "910B", [m], dtype=x.dtype) for m in (stored, off))]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("product", "dtype", "out", "inputs", "groups", "parts"),
    [
        ("cpu", torch.bfloat16, 24, 512, 0, 1),
        ("950", torch.bfloat16, 24, 512, 0, 1),
        ("910B", torch.float32, 24, 512, 0, 1),
        ("910B", torch.bfloat16, 12, 512, 0, 1),
        ("910B", torch.bfloat16, 24, 384, 0, 1),
        ("910B", torch.bfloat16, 24, 512, 4, 1),
        ("910B", torch.bfloat16, 24, 512, 0, 0),
        ("910B", torch.bfloat16, 8, 29696, 0, 1),
    ],
)
def test_where_the_operator_cannot_take_the_form_it_is_int8(
    workbench: Any, product: str, dtype: torch.dtype, out: int, inputs: int, groups: int, parts: int
) -> None:
    """Product, dtype, rows, input features, groups, no scale_bias, too many features."""
    stored = w4a8_dynamic(out, inputs, groups, parts=parts)
    scheme, layer = serve(workbench, product, [stored], dtype=dtype)
    assert layer.weight.dtype == torch.int8
    x = exact_codes_input(3, inputs, dtype)
    close(scheme.apply(layer, x), exact_output(x, exact_weight(stored, inputs)))


@pytest.mark.parametrize("device", ["cpu", "910B"])
@pytest.mark.parametrize("tokens", [0, 1, 33000])
def test_any_number_of_tokens_and_zero_rows(workbench: Any, device: str, tokens: int) -> None:
    stored = w4a8_dynamic(8, 256)
    scheme, layer = serve(workbench, device, [stored], dtype=torch.bfloat16)
    x = exact_codes_input(tokens, 256, torch.bfloat16)
    x[::3] = 0
    got = scheme.apply(layer, x)
    assert not got[::3].any()
    close(got, exact_output(x, exact_weight(stored, 256)), 2**-10)


@pytest.mark.parametrize("device", ["cpu", "910B"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("parts", [1, 16, 1536])
@pytest.mark.parametrize("groups", [0, 6])
def test_a_row_parallel_layer_cancels_on_every_rank(
    workbench: Any, device: str, size: int, parts: int, groups: int
) -> None:
    """Each rank's assist term is that of its own input features, whatever parts the files hold; the bias comes once."""
    stored, inputs = w4a8_dynamic(24, 1536, groups, parts=parts), 1536
    x = torch.cat([exact_codes_input(3, inputs // size) for _ in range(size)], dim=-1).to(torch.bfloat16)
    weight, total = exact_weight(stored, inputs), torch.zeros(3, 24, dtype=torch.float64)
    for rank in range(size):
        part = slice(rank * inputs // size, (rank + 1) * inputs // size)
        scheme, layer = serve(workbench, device, [stored], dtype=torch.bfloat16, partition=Partition("row", rank, size))
        got = scheme.apply(layer, x[:, part], tp_rank=rank)
        close(got, exact_output(x[:, part], weight[:, part]), 2**-10)
        total += got.double()
    close(total.to(torch.bfloat16), x.double() @ weight.t(), 2**-7)


SHAPES = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3))


@settings(max_examples=40)
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 2**30))
def test_tensor_parallel_outputs(
    workbench: Any, shape: tuple[int, list[int], int], grouped: bool, packed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    size, outputs, length = shape
    width = 16 * length
    members = [w4a8_dynamic(2 * n * size, width * size, 2 * size if grouped else 0, packed) for n in outputs]
    x = torch.cat([exact_codes_input(3, width) for _ in range(size)], dim=-1)
    weight = torch.cat([exact_weight(m, width * size) for m in members])
    scheme, layer = workbench.serve(Scheme, members)
    columns = workbench.run_ranks(Scheme, members, x, "column", size)
    torch.testing.assert_close(columns, scheme.apply(layer, x), rtol=1e-6, atol=1e-4)
    summed = workbench.run_ranks(Scheme, members, x, "row", size)
    torch.testing.assert_close(summed.double(), x.double() @ weight.t(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("out", "kind", "groups", "works"), [(12, "column", 0, 3), (8, "row", 6, 3)], ids=["pair", "group"]
)
def test_a_cut_through_a_pair_or_a_group_names_a_size_that_works(
    workbench: Any, out: int, kind: Any, groups: int, works: int
) -> None:
    with pytest.raises(LimitError, match=f"use tensor_parallel_size {works}"):
        workbench.serve(Scheme, [w4a8_dynamic(out, 96, groups)], partition=Partition(kind, 0, 4))


def test_what_is_stored_is_declared_and_what_must_be_zero_checked(workbench: Any) -> None:
    stored = w4a8_dynamic(24, 128, 2, parts=16)
    scheme = Scheme.create(workbench.context([stored], scheme_class=Scheme))
    verify_stored(scheme)
    params = scheme.params(128, 24)
    assert params.keys() == stored.keys()
    assert params["weight_offset"].dtype == torch.int64
    for name in ("weight_channel_offset", "weight_offset"):
        check = params[name].check
        assert check is not None
        assert "symmetric" in str(check(torch.ones(2, 2, dtype=params[name].dtype)))


@pytest.mark.parametrize(("parts", "loaded"), [(1, 1), (16, 8), (128, 64)])
def test_of_a_scale_bias_in_parts_a_rank_loads_its_own(workbench: Any, parts: int, loaded: int) -> None:
    stored = w4a8_dynamic(8, 128, parts=parts)
    context = workbench.context([stored], scheme_class=Scheme, partition=Partition("row", 1, 2))
    layer = workbench.load(Scheme.create(context), [stored])
    assert torch.equal(layer.scale_bias, stored["scale_bias"][:, -loaded:])


def test_unequal_groups_are_refused(workbench: Any) -> None:
    stored = {**w4a8_dynamic(8, 64, 2), "weight_scale": torch.ones(8, 3)}
    (reason,) = Scheme.can_serve(workbench.context([stored], scheme_class=Scheme))
    assert reason == (
        "64 input features cannot be cut into 3 equal groups: m0.weight_scale in model.safetensors is [8, 3], "
        "expected [8, a divisor of 64]; groups of 16 or 32 input features would fit"
    )


class Operands(TorchDispatchMode):
    """Records the dtypes of the tensors that go into npu_quant_matmul."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "npu_quant_matmul" in str(func):
            self.dtypes = [tensor.dtype for tensor in args]
        return func(*args, **(kwargs or {}))


def test_one_operator_multiplies_int8_by_int4(workbench: Any) -> None:
    scheme, layer = serve(workbench, "910B", [w4a8_dynamic(8, 256)], dtype=torch.bfloat16)
    with Operands() as operands:
        scheme.apply(layer, torch.randn(2, 256).to(torch.bfloat16))
    assert operands.dtypes == [torch.int8, torch.int32, torch.int64]


@given(st.integers(0, 2**30), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_quantising_loses_half_a_step(
    workbench: Any, seed: int, rows: int, groups: int, length: int, packed: bool
) -> None:
    """In one stage and in two; and what it returns is what is declared."""
    rows, inputs = 2 * rows, 16 * length * max(1, groups)
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    weight *= 10.0 ** torch.arange(max(1, groups)).repeat_interleave(inputs // max(1, groups))
    weight[0] = 0
    plan = w4a8_dynamic(rows, inputs, groups, packed, parts=16)
    scheme = Scheme.create(workbench.context([plan], scheme_class=Scheme))
    stored = scheme.quantize(weight)
    assert stored.keys() == plan.keys()
    layer = workbench.load(scheme, [stored])  # asserts shapes and dtypes
    step = (stored["weight_scale"] * stored.get("weight_channel_scale", torch.ones(1, 1))).repeat_interleave(
        inputs // max(1, groups), 1
    )
    assert bool(((scheme.dequantize(layer) - weight).abs() <= step * (0.5 + 1e-5)).all())
    torch.testing.assert_close(stored["scale_bias"].sum(1), 8 * scheme.dequantize(layer).sum(1), rtol=1e-4, atol=1e-2)
