"""From a format's answer to a scheme, and finding formats."""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant_core import (
    ActivationForm,
    AttentionContext,
    AttentionSizes,
    CheckpointError,
    CheckpointFolder,
    Evidence,
    ExpertsContext,
    ExpertSizes,
    LayerQuant,
    LayerQuery,
    LayerResolutionError,
    LimitError,
    LinearSizes,
    LoadError,
    Packing,
    Partition,
    QuantFormat,
    RegistrationError,
    StoredForm,
    StoredTensor,
    UnsupportedSchemeError,
    WeightForm,
    create_scheme,
    detect_formats,
    formats,
    list_formats,
)
from quant_core.judging import layer_context
from quant_core.schemes.linear.w8a8_dynamic import AscendW8A8DynamicLinearMethod as Dynamic


def module(name: str, rows: int, columns: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The stored tensors of a W8A8_DYNAMIC module."""
    return {
        f"{name}.weight": torch.zeros(rows, columns, dtype=torch.int8),
        f"{name}.weight_scale": torch.ones(rows, 1, dtype=dtype),
        f"{name}.weight_offset": torch.zeros(rows, 1, dtype=dtype),
    }


@pytest.fixture(scope="module")
def example() -> type[QuantFormat]:
    """The format of the documentation, executed as it stands in the docstring."""
    lines = formats.__doc__.split("\n")
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    return names["EverythingInt8"]


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Some modules, one of them fused."""
    tensors = {
        **module("a.q", 8),
        **module("a.k", 4),
        **module("a.v", 4),
        **module("a.o", 16, 8),
        **module("a.qkv", 16),
    }
    tensors |= {**module("half", 4, dtype=torch.bfloat16), "norm.weight": torch.ones(16)}
    save_file({**tensors, "a.q.bias": torch.zeros(8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"everything_int8": True}))
    return CheckpointFolder(tmp_path)


def query(*modules: str, **options: Any) -> LayerQuery:
    """A question about a layer of these modules."""
    names = ("input_size", "output_sizes", "local_output_sizes")
    if given := {key: options.pop(key) for key in names if key in options}:
        options["sizes"] = LinearSizes(**given)
    return LayerQuery(name="layer", modules=modules, **options)


def test_a_format_recognises_its_folders(example: type[QuantFormat], folder: CheckpointFolder, tmp_path: Path) -> None:
    detection = example.detect(folder)
    assert detection is not None
    assert (detection.format, detection.reason) == ("everything-int8", "config.json says everything_int8")
    (tmp_path / "other").mkdir()
    assert example.detect(CheckpointFolder(tmp_path / "other")) is None


def test_a_scheme_for_a_layer(example: type[QuantFormat], folder: CheckpointFolder) -> None:
    """Sizes that the engine does not give come from the files."""
    scheme = example.load(folder).create_scheme_for_layer(query("a.q"))
    assert isinstance(scheme, Dynamic)
    context = scheme.context
    assert (context.input_size, [shard.output_size for shard in context.shards]) == (16, [8])
    assert context.form.dtype("weight_scale", torch.int8) == torch.float32
    assert context.stored[0].has("bias")


def test_a_scheme_for_a_fused_and_cut_layer(example: type[QuantFormat], folder: CheckpointFolder) -> None:
    asked = query(
        *("a.q", "a.k", "a.v"),
        input_size=16,
        output_sizes=(8, 4, 4),
        local_output_sizes=(4, 2, 2),
        partition=Partition("column", 1, 2),
        params_dtype=torch.float16,
        has_bias=True,
        role="decode",
    )
    context = example.load(folder).create_scheme_for_layer(asked).context
    assert [(s.name, s.output_size, s.local_output_size) for s in context.shards] == [
        ("a.q", 8, 4),
        ("a.k", 4, 2),
        ("a.v", 4, 2),
    ]
    assert [form.module for form in context.stored] == ["a.q", "a.k", "a.v"]
    assert (context.params_dtype, context.has_bias, context.role) == (torch.float16, True, "decode")
    assert context.partition == Partition("column", 1, 2)


def test_a_module_that_is_fused_on_disk_serves_all_members(
    example: type[QuantFormat], folder: CheckpointFolder
) -> None:
    asked = query("a.qkv", input_size=16, output_sizes=(8, 4, 4))
    context = example.load(folder).create_scheme_for_layer(asked).context
    assert [(shard.name, shard.output_size) for shard in context.shards] == [("a.qkv", 8), ("a.qkv", 4), ("a.qkv", 4)]
    assert len(context.stored) == 3


def test_a_float_layer_has_no_scheme(example: type[QuantFormat], folder: CheckpointFolder, monkeypatch: Any) -> None:
    float_layer = LayerQuant(None, ("norm",), reason="it is a norm")
    monkeypatch.setattr(example, "layer_quant", lambda self, query: float_layer)
    assert example.load(folder).create_scheme_for_layer(query("norm")) is None


@pytest.mark.parametrize(
    ("asked", "error", "parts"),
    [
        (
            query("a.q", layer_type="moe"),
            LayerResolutionError,
            ["layer: a question about experts names the modules of none"],
        ),
        (query("norm"), LoadError, ["norm: the stored tensors do not tell the layer's sizes", "norm.weight [16]"]),
        (query("a.x"), LoadError, ["a.x", "no tensor of this name"]),
        (query("a.q", input_size=16, output_sizes=(9,)), LoadError, ["int8 [8, 16], expected int8 [9, 16]"]),
        # One of the two sizes from the engine: the other comes from the files, and the engine's is not forgotten.
        (query("a.q", output_sizes=(9,)), LoadError, ["int8 [8, 16], expected int8 [9, 16]"]),
        (query("a.q", input_size=32), LoadError, ["int8 [8, 16], expected int8 [8, 32]"]),
        (query("a.q", "a.o"), LoadError, ["a.o.weight", "int8 [16, 8], expected int8 [16, 16]"]),
        (query("a.q", "half"), LoadError, ["half.weight_scale", "bfloat16 [4, 1], expected float32 [4, 1]"]),
        (query("a.q", "a.x", input_size=16, output_sizes=(8, 4)), LoadError, ["a.x.weight is absent"]),
        (
            query("a.q", "a.k", input_size=16, output_sizes=(8, 4, 4)),
            LimitError,
            ["fuses 3 members", "has 2", "a.q, a.k"],
        ),
        (query("a.q", local_output_sizes=(4, 4)), LimitError, ["fuses 1 members (2 on this rank)", "has 1"]),
    ],
)
def test_what_cannot_be_served(
    asked: LayerQuery, error: type[Exception], parts: list[str], example: type[QuantFormat], folder: CheckpointFolder
) -> None:
    with pytest.raises(error) as raised:
        example.load(folder).create_scheme_for_layer(asked)
    for part in parts:
        assert part in str(raised.value)


def test_a_form_that_a_scheme_refuses(example: type[QuantFormat], folder: CheckpointFolder) -> None:
    quant = example.load(folder).layer_quant(query("a.q"))
    form = quant.stored[0]
    scale = form.tensors["weight_scale"]._replace(shape=(8, 3))
    groups = WeightForm(strategy="group", group_size=6)
    grouped = replace(quant, stored=(replace(form, weight=groups, tensors={**form.tensors, "weight_scale": scale}),))
    with pytest.raises(UnsupportedSchemeError) as raised:
        create_scheme(query("a.q"), grouped)
    message = str(raised.value)
    assert "layer: the type W8A8_DYNAMIC cannot be served here" in message
    assert "where: config.json: everything_int8 = true" in message
    assert "cannot be cut into 3 equal groups" in message


def test_planning_without_files() -> None:
    """Sizes then come from the engine alone."""
    quant = LayerQuant("W8A8_DYNAMIC", ("a", "b"), evidence=(Evidence("f", "k", "v"),))
    context = layer_context(query("a", "b", input_size=16, output_sizes=(8, 4)), quant)
    assert (context.stored, context.input_size, context.output_size) == ((), 16, 12)
    with pytest.raises(LoadError, match="layer: the stored tensors do not tell"):
        layer_context(query("a", "b"), quant)


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Announces an attribute of a module that re-exports quant_core's names."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    classes = {
        "One": "name, vllm_name = 'one', 'method'",
        "Two": "name, vllm_name = 'one', 'another'",
        "SameMethod": "name, vllm_name = 'three', 'method'",
        "Nameless": "vllm_name = 'method'",
        "Methodless": "name = 'methodless'",
        "Failing": "name, vllm_name = 'failing', 'failing'",
    }
    detect = {"Failing": "1 / 0"}
    marked = "Detection(cls.name, 'marked') if folder.files('of-one') else None"
    sources = [
        f"class {name}(QuantFormat):\n    {body}\n    @classmethod\n    def detect(cls, folder):\n"
        f"        return {detect.get(name, marked)}\n"
        for name, body in classes.items()
    ]
    (site / "announced_formats.py").write_text("\n\n".join(["from quant_core import *", *sources]))

    def write(distribution: str, value: str) -> None:
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{formats.ENTRY_POINT_GROUP}]\n{distribution} = {value}\n")
        formats._announced.cache_clear()

    yield write
    sys.modules.pop("announced_formats", None)
    formats._announced.cache_clear()


def test_a_format_may_be_announced_twice(announce: Callable[[str, str], None]) -> None:
    announce("first", "announced_formats:One")
    announce("second", "announced_formats:One")
    listed = list_formats()
    assert listed["one"].__name__ == "One"
    assert list(listed) == sorted(listed)
    assert formats.disputed_formats() == {}


@pytest.mark.parametrize(
    ("second", "told"),
    [("Two", "two formats are called 'one'"), ("SameMethod", "two formats claim vLLM's method 'method'")],
)
def test_two_formats_that_claim_one_name(
    second: str,
    told: str,
    announce: Callable[[str, str], None],
    folder: CheckpointFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning; an error for a folder that one of them recognises."""
    announce("first", "announced_formats:One")
    announce("second", f"announced_formats:{second}")
    assert detect_formats(folder) == []
    (folder.path / "of-one").touch()
    with pytest.raises(RegistrationError, match=told) as raised:
        detect_formats(folder)
    for message in (str(raised.value), caplog.text):
        assert "announced_formats.One" in message
        assert f"announced_formats.{second}" in message
        assert "uninstall the package of one of them" in message


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("announced_formats:CheckpointFolder", "is not a QuantFormat"),
        ("announced_formats:list_formats", "is not a QuantFormat"),
        ("announced_formats", "is not a QuantFormat"),
        ("announced_formats:Nameless", "is not a QuantFormat with a name"),
        ("announced_formats:Methodless", "is not a QuantFormat with a name and a vllm_name"),
        ("announced_formats:Absent", "what third announces cannot be imported"),
        ("nothing_of_this_name:One", "what third announces cannot be imported"),
    ],
)
def test_what_is_no_format(
    value: str, told: str, announce: Callable[[str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """One warning that names the package; the other formats are there."""
    announce("third", value)
    announce("first", "announced_formats:One")
    assert "one" in list_formats()
    assert "one" in list_formats()
    assert caplog.text.count(told) == 1
    assert f"{value!r}" in caplog.text
    assert "uninstall third" in caplog.text


def test_a_format_that_fails_to_look_at_a_folder(
    announce: Callable[[str, str], None], folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A stranger's mistake is no reason to refuse a model that may be none of its own."""
    announce("third", "announced_formats:Failing")
    assert detect_formats(folder) == []
    assert "announced_formats.Failing cannot tell" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_entry_points_are_read_once(announce: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines ask at every layer, and some before every tensor."""
    announce("first", "announced_formats:One")
    list_formats()
    monkeypatch.setattr(formats, "entry_points", None)
    assert "one" in list_formats()


EXPERTS = ExpertSizes(hidden_size=64, intermediate_size=32, num_experts=4, local_experts=(2, 3), activation="gelu")
ATTENTION = AttentionSizes(num_heads=8, num_kv_heads=2, head_size=16, value_head_size=16, local_heads=(4, 1))


@pytest.mark.parametrize(
    ("layer_type", "sizes", "kind"), [("moe", EXPERTS, ExpertsContext), ("attention", ATTENTION, AttentionContext)]
)
def test_the_sizes_of_a_layer_that_is_not_linear(layer_type: str, sizes: Any, kind: type) -> None:
    """They come from the engine; what the files hold does not have to tell them."""
    quant = LayerQuant("SOME_TYPE", ("a", "b"), (StoredForm("a"), StoredForm("b")))
    context = layer_context(query("a", "b", layer_type=layer_type, sizes=sizes, role="decode"), quant)
    assert isinstance(context, kind)
    assert (context.sizes, context.name, context.role, len(context.stored)) == (sizes, "layer", "decode", 2)
    for wrong in (None, LinearSizes(64, (32,))):
        with pytest.raises(LimitError, match=f"a scheme for {layer_type} layers needs the sizes of one"):
            layer_context(query("a", "b", layer_type=layer_type, sizes=wrong), quant)


def test_suffixes_of_a_format(example: type[QuantFormat], tmp_path: Path) -> None:
    """One map, for the headers and for the stream; messages use the format's own names."""

    class Renaming(example):  # type: ignore[misc, valid-type]
        def canonical_suffixes(self, form: StoredForm) -> dict[str, str | None]:
            return {"weight_packed": "weight", "weight_shape": None}

    names = ("weight_packed", "weight_shape", "weight_scale")
    save_file({f"a.{name}": torch.zeros(4, 1) for name in names}, tmp_path / "model.safetensors")
    read = Renaming.load(CheckpointFolder(tmp_path))
    (form,) = read.stored_forms(["a"])
    assert sorted(form.tensors) == ["weight", "weight_scale"]
    assert form.tensors["weight"].name == "a.weight_packed"
    assert (form.name_of("weight"), form.name_of("weight_offset")) == ("a.weight_packed", "a.weight_offset")
    told = {name: read.canonical_name(f"a.{name}") for name in names}
    assert told == {"weight_packed": "a.weight", "weight_shape": None, "weight_scale": "a.weight_scale"}
    assert read.canonical_name("b.weight_packed") == "b.weight_packed"  # no module of the files

    save_file({"a.weight_packed": torch.zeros(4, 1), "a.weight": torch.zeros(4, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a stores the same twice: a.weight.* and a.weight"):
        _ = Renaming.load(CheckpointFolder(tmp_path)).modules


INT4 = WeightForm(num_bits=4, symmetric=False, packing=Packing(0))


def packed(module: str, rows: int, **changes: Any) -> StoredForm:
    """A W4A16 module packed along its output features, and how it is stated."""
    shapes = {"weight": ((rows // 2, 16), torch.int8), "weight_scale": ((rows, 1), torch.float32)}
    tensors = {s: StoredTensor(f"{module}.{s}", shape, dtype, "w") for s, (shape, dtype) in shapes.items()}
    return StoredForm(module, tensors, replace(INT4, **changes))


def test_members_of_a_packed_module_that_is_fused_on_disk() -> None:
    """q and k in one module, v in another; two output features share a byte."""
    quant = LayerQuant("W4A16", ("qk", "v"), (packed("qk", 12), packed("v", 4)))
    scheme = create_scheme(query("qk", "v", input_size=16, output_sizes=(8, 4, 4)), quant)
    assert [(shard.name, shard.output_size) for shard in scheme.context.shards] == [("qk", 8), ("qk", 4), ("v", 4)]
    with pytest.raises(LimitError, match="fuses 3 members"):
        create_scheme(query("qk", "v", input_size=16, output_sizes=(6, 4, 6)), quant)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"symmetric": True}, None),
        ({"num_bits": 8, "packing": None}, "has no int8 weights"),
        ({"strategy": "token"}, "has no scales per token"),
        ({"strategy": "block", "block_structure": (16, 16)}, "has no scales per block"),
        ({"scale_dtype": torch.uint8}, "has no such a form"),
        ({"type": "float"}, "has no float4 weights"),
    ],
)
def test_what_is_stated_must_be_the_types(changes: dict[str, Any], told: str | None) -> None:
    """A scheme would compute something else, without a word."""
    quant = LayerQuant("W4A16", ("a",), (packed("a", 8, **changes),))
    if told is None:
        assert create_scheme(query("a"), quant) is not None
        return
    with pytest.raises(UnsupportedSchemeError, match=told):
        create_scheme(query("a"), quant)


def test_an_asymmetric_weight_of_a_symmetric_type() -> None:
    form = replace(packed("a", 8), weight=WeightForm(symmetric=False))
    with pytest.raises(UnsupportedSchemeError, match="has no asymmetric weights"):
        create_scheme(query("a"), LayerQuant("W8A8", ("a",), (form,)))


def test_other_activations_than_the_types() -> None:
    tensors = {s: StoredTensor(f"a.{s}", shape, d, "w") for s, shape, d in [("weight", (8, 16), torch.int8)]}
    form = StoredForm("a", tensors, WeightForm(), input=ActivationForm(num_bits=4))
    with pytest.raises(UnsupportedSchemeError, match="has no such activations"):
        create_scheme(query("a"), LayerQuant("W8A8_DYNAMIC", ("a",), (form,)))


def test_members_must_be_stored_alike() -> None:
    """The same shapes in another packing would be read with the first one's."""
    signed, unsigned = (packed(name, 8, packing=Packing(0, signed=name == "a")) for name in "ab")
    asked = query("a", "b", input_size=16, output_sizes=(8, 8))
    with pytest.raises(LoadError, match=r"stored in different forms\n  found: b otherwise than a"):
        create_scheme(asked, LayerQuant("W4A16", ("a", "b"), (signed, unsigned)))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"packing": Packing(1)}, "2 values of 8 bits"),
        ({"num_bits": 4, "packing": Packing(1, values=1)}, "1 values of 4 bits"),
        ({"strategy": "group", "group_size": 0}, "'group_size': 0"),
        ({"strategy": "group", "group_size": -1}, "'group_size': -1"),
    ],
)
def test_a_format_cannot_state_what_cannot_be(form: dict[str, Any], told: str) -> None:
    with pytest.raises(RegistrationError, match=told):
        WeightForm(**form)


def test_of_a_module_of_which_nothing_is_stated_the_usual_form_holds() -> None:
    tensors = {
        "weight": StoredTensor("a.weight", (8, 32), torch.uint8, "w"),
        "weight_scale": StoredTensor("a.weight_scale", (8, 2), torch.uint8, "w"),
    }
    scheme = create_scheme(query("a"), LayerQuant("W4A4_MXFP4", ("a",), (StoredForm("a", tensors),)))
    assert (scheme.context.input_size, scheme.context.output_size) == (64, 8)


def test_the_formats_own_names_in_messages() -> None:
    form = StoredForm("a", spelling={"weight": "weight_packed"})
    assert (form.name_of("weight"), form.name_of("weight_scale")) == ("a.weight_packed", "a.weight_scale")
