"""Quantised caches: what is stored for them, what is wrong with it, each rank's part, and attention in float64."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from quant_core import (
    AscendAttentionScheme,
    AttentionBatch,
    AttentionSizes,
    LayerQuant,
    LayerQuery,
    LoadError,
    Pages,
    QuantError,
    StoredForm,
    StoredTensor,
    WeightForm,
    create_scheme,
)

Kind = Literal["channel", "head", "tensor"]

#: 2 key/value heads of 8 for 4 query heads, all on one rank.
SIZES = AttentionSizes(num_heads=4, num_kv_heads=2, head_size=8, value_head_size=8, local_heads=(4, 2))
SHAPES: dict[str, tuple[int, ...]] = {"channel": (16,), "head": (2, 1, 1), "tensor": (1,)}
FP8_MAX = 448.0


def scheme_for(
    tensors: Mapping[str, Tensor], kind: Kind = "channel", quant_type: str = "C8", sizes: AttentionSizes = SIZES
) -> AscendAttentionScheme:
    """The scheme of a layer with these stored tensors."""
    stored = {n: StoredTensor(f"attn.x.{n}", tuple(t.shape), t.dtype, "file") for n, t in tensors.items()}
    of_type: Literal["int", "float"] = "int" if quant_type == "C8" else "float"
    symmetric = not any(name.endswith("_offset") for name in tensors)
    form = StoredForm("attn", stored, weight=WeightForm(type=of_type, strategy=kind, symmetric=symmetric))
    query = LayerQuery("attn", "attention", sizes=sizes, params_dtype=torch.float32)
    scheme = create_scheme(query, LayerQuant(quant_type, ("attn",), (form,)))
    assert isinstance(scheme, AscendAttentionScheme)
    return scheme


def drawn(kind: Kind, offsets: bool = True, shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    shape = shape or SHAPES[kind]
    tensors = {name: torch.rand(shape) * 0.05 + 0.01 for name in ("k_scale", "v_scale")}
    if offsets:
        tensors |= {name: torch.randint(-20, 20, shape).float() for name in ("k_offset", "v_offset")}
    return tensors


def processed(scheme: AscendAttentionScheme, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A layer that holds them as an engine loads them, processed."""
    layer = nn.Module()
    for name, param in scheme.params().items():
        assert tuple(param.shape) == tuple(tensors[name].shape)
        assert param.dtype == tensors[name].dtype
        layer.register_parameter(name, nn.Parameter(tensors[name].clone(), requires_grad=False))
    scheme.process_weights_after_loading(layer)
    return layer


def spread(tensor: Tensor, kind: Kind) -> Tensor:
    """[heads, size] in float64, by what shares a value."""
    if kind == "channel":
        return tensor.double().view(2, 8)
    return tensor.double().view(-1, 1).expand(2, 8)


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["channel", "head", "tensor"])
def test_run_time_form(kind: Kind, dtype: torch.dtype, offsets: bool) -> None:
    """One float32 number for each channel, whatever is stored."""
    tensors = {name: tensor.to(dtype) for name, tensor in drawn(kind, offsets).items()}
    scheme = scheme_for(tensors, kind)
    assert scheme.params().keys() == tensors.keys()
    layer = processed(scheme, tensors)
    found = dict(layer.named_parameters())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].double(), spread(tensor, kind)), name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_of_one_value_in_any_shape(shape: tuple[int, ...]) -> None:
    """Writers differ."""
    tensors = drawn("tensor", offsets=False, shape=shape)
    layer = processed(scheme_for(tensors, "tensor"), tensors)
    assert torch.equal(layer.get_parameter("k_scale").data, tensors["k_scale"].reshape(1, 1).expand(2, 8))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)])
def test_scales_of_heads_in_any_shape(shape: tuple[int, ...]) -> None:
    tensors = drawn("head", offsets=False, shape=shape)
    layer = processed(scheme_for(tensors, "head"), tensors)
    assert torch.equal(layer.get_parameter("v_scale").data, tensors["v_scale"].reshape(2, 1).expand(2, 8))


def test_planning_without_files() -> None:
    """What a description alone tells: the usual shapes, and offsets."""
    form = StoredForm("attn")
    query = LayerQuery("attn", "attention", sizes=SIZES, params_dtype=torch.float32)
    scheme = create_scheme(query, LayerQuant("C8", ("attn",), (form,)))
    assert isinstance(scheme, AscendAttentionScheme)
    assert {name: tuple(param.shape) for name, param in scheme.params().items()} == dict.fromkeys(
        ("k_scale", "k_offset", "v_scale", "v_offset"), (16,)
    )


@pytest.mark.parametrize(("heads", "value_size"), [(1, 8), (4, 8), (2, 4), (2, 16)])
def test_sizes_of_another_model(heads: int, value_size: int) -> None:
    """Each tensor that does not fit is named as the checkpoint names it, with what it should be."""
    sizes = dataclasses.replace(SIZES, num_kv_heads=heads, local_heads=(4, heads), value_head_size=value_size)
    with pytest.raises(LoadError) as raised:
        scheme_for(drawn("channel"), sizes=sizes)
    message = str(raised.value)
    wrong = {name for name in ("k_scale", "k_offset") if heads != 2} | {"v_scale", "v_offset"}
    for name in ("k_scale", "k_offset", "v_scale", "v_offset"):
        assert (f"attn.x.{name} in file is [16]" in message) == (name in wrong), message
    assert f"expected: {heads * value_size} values, per channel of {heads} heads of {value_size}" in message


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_an_absent_scale(name: str) -> None:
    tensors = drawn("channel")
    del tensors[name]
    with pytest.raises(LoadError, match=f"found: .*{name} is absent"):
        scheme_for(tensors)


@pytest.mark.parametrize(("quant_type", "kind", "stated"), [("C8", "channel", "float"), ("KV_FP8", "tensor", "int")])
def test_a_form_that_the_scheme_does_not_keep(quant_type: str, kind: Kind, stated: Any) -> None:
    form = StoredForm("attn", {}, weight=WeightForm(type=stated, strategy=kind))
    query = LayerQuery("attn", "attention", sizes=SIZES, params_dtype=torch.float32)
    with pytest.raises(QuantError, match=f"has no {stated}8 cache"):
        create_scheme(query, LayerQuant(quant_type, ("attn",), (form,)))


@pytest.mark.parametrize("strategy", ["token", "group", "block"])
def test_scales_that_are_shared_otherwise(strategy: Any) -> None:
    form = StoredForm("attn", {}, weight=WeightForm(strategy=strategy))
    query = LayerQuery("attn", "attention", sizes=SIZES, params_dtype=torch.float32)
    with pytest.raises(QuantError, match=f"no scales per {strategy}"):
        create_scheme(query, LayerQuant("C8", ("attn",), (form,)))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_values_that_no_scale_has(bad: float) -> None:
    tensors = drawn("channel")
    param = scheme_for(tensors).params()["v_scale"]
    assert param.check is not None
    assert param.check(tensors["v_scale"]) is None
    tensors["v_scale"][3] = bad
    assert "finite and positive" in str(param.check(tensors["v_scale"]))


def test_offsets_of_a_symmetric_cache_are_zero() -> None:
    """Stored by some writers, checked, and left behind."""
    tensors = drawn("tensor", offsets=False) | {"k_offset": torch.zeros(1, dtype=torch.int8)}
    stored = {n: StoredTensor(f"attn.{n}", tuple(t.shape), t.dtype, "file") for n, t in tensors.items()}
    form = StoredForm("attn", stored, weight=WeightForm(strategy="tensor"))
    query = LayerQuery("attn", "attention", sizes=SIZES, params_dtype=torch.float32)
    scheme = create_scheme(query, LayerQuant("C8", ("attn",), (form,)))
    assert isinstance(scheme, AscendAttentionScheme)
    check = scheme.params()["k_offset"].check
    assert check is not None
    assert check(tensors["k_offset"]) is None
    assert check(tensors["k_offset"] + 1) is not None
    assert dict(processed(scheme, tensors).named_parameters()).keys() == {"k_scale", "v_scale"}


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "head", "tensor"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (0, 2)])
def test_the_heads_of_a_rank(first: int, count: int, kind: Kind) -> None:
    """Cut, or with a head that other ranks hold as well."""
    tensors = drawn(kind)
    sizes = dataclasses.replace(SIZES, local_heads=(2, count), first_kv_head=first)
    layer = processed(scheme_for(tensors, kind, sizes=sizes), tensors)
    for name, tensor in tensors.items():
        assert torch.equal(layer.get_parameter(name).double(), spread(tensor, kind)[first : first + count])


# --- writing and attending --------------------------------------------------------------------------------------------


def codes(values: Tensor, scale: Tensor, offset: Tensor | None, quant_type: str) -> Tensor:
    """What a cache keeps of [tokens, heads, size], as numbers in float64."""
    scaled = values.double() / scale + (0 if offset is None else offset)
    if quant_type == "C8":
        return scaled.round().clamp(-128, 127)
    return scaled.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).double()


def expected(
    query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, starts: list[int], lengths: list[int]
) -> Tensor:
    """Causal attention of each request's last tokens in float64."""
    out = torch.empty(query.shape, dtype=torch.float64)
    begin = 0
    for request, length in enumerate(lengths):
        k, v = keys[begin : begin + length], values[begin : begin + length]
        begin += length
        for token in range(starts[request], starts[request + 1]):
            seen = length - (starts[request + 1] - token) + 1
            for head in range(4):
                scores = k[:seen, head // 2] @ query[token, head].double() * batch.scale
                out[token, head] = scores.softmax(0) @ v[:seen, head // 2]
    return out


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("kind", ["channel", "head", "tensor"])
@pytest.mark.parametrize("quant_type", ["C8", "KV_FP8"])
def test_writing_and_attending(quant_type: str, kind: Kind, offsets: bool) -> None:
    """In pages of no order: codes as the formula says, to the bit, and attention over them."""
    tensors = drawn(kind, offsets)
    scheme = scheme_for(tensors, kind, quant_type)
    layer = processed(scheme, tensors)
    wide = {name: spread(tensor, kind) for name, tensor in tensors.items()}
    lengths, starts, size = [7, 3, 10], [0, 2, 3, 8], 4
    table = torch.tensor([[5, 2, 0], [7, 0, 0], [1, 6, 3]], dtype=torch.int32)
    slots = torch.cat([table[r].long().repeat_interleave(size)[:n] * size + torch.arange(n) % size
                       for r, n in enumerate(lengths)])  # fmt: skip
    pages = Pages(*(torch.zeros(8, 2, size, 8, dtype=scheme.cache_dtype) for _ in "kv"))
    key, value = torch.randn(20, 2, 8), torch.randn(20, 2, 8) + 0.5
    key[0, 0, :4] = torch.tensor([1e4, -1e4, 1e-9, 0.0])  # saturated both ways, and small
    scheme.write(layer, key, value, pages, slots)
    kept = {}
    for part, x, held in (("k", key, pages.keys), ("v", value, pages.values)):
        scale, offset = wide[f"{part}_scale"], wide.get(f"{part}_offset")
        want = codes(x, scale, offset, quant_type)
        found = held[slots // size, :, slots % size].to(torch.float64)
        assert torch.equal(found, want)
        kept[part] = (want - (0 if offset is None else offset)) * scale
    batch = AttentionBatch(
        table, torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), scale=0.3
    )
    query, out = torch.randn(8, 4, 8), torch.empty(8, 4, 8)
    scheme.attend(layer, query, pages, batch, out)
    want = expected(query, kept["k"], kept["v"], batch, starts, lengths)
    assert (out - want).abs().max() < 1e-5 * want.abs().max()


def test_tokens_of_nobody_are_not_written() -> None:
    tensors = drawn("channel")
    scheme = scheme_for(tensors)
    layer = processed(scheme, tensors)
    pages = Pages(*(torch.full((2, 2, 4, 8), 77, dtype=torch.int8) for _ in "kv"))
    key = torch.randn(3, 2, 8)
    scheme.write(layer, key, key, pages, torch.tensor([-1, 5, -1]))
    for held in pages:
        rest = held.clone()
        assert not (rest[1, :, 1] == 77).all()
        rest[1, :, 1] = 77
        assert (rest == 77).all()


def test_both_at_once_is_one_after_the_other() -> None:
    tensors = drawn("channel")
    scheme = scheme_for(tensors)
    layer = processed(scheme, tensors)
    batch = AttentionBatch(*(torch.tensor(x, dtype=torch.int32) for x in ([[1]], [0, 3], [3])), scale=0.3)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    answers = []
    for at_once in (True, False):
        pages = Pages(*(torch.zeros(2, 2, 4, 8, dtype=torch.int8) for _ in "kv"))
        out, slots = torch.empty(3, 4, 8), torch.arange(4, 7)
        if at_once:
            assert scheme.apply(layer, query, key, value, pages, slots, batch, out) is out
        else:
            scheme.write(layer, key, value, pages, slots)
            scheme.attend(layer, query, pages, batch, out)
        answers.append(out)
    assert torch.equal(*answers)
