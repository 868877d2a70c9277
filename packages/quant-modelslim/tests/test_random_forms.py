"""Random stored forms of every linear type: served, or refused by an error of ours that names the module.

Never by what Python or torch raises where a shape is not what a line of code took for granted. More of it:
`nox -s fuzz`, or --hypothesis-profile=fuzz.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

from quant_core import CheckpointFolder, LayerQuery, LinearSizes, Partition, QuantError, list_schemes
from quant_core.checkpoint import PlannedFolder
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.handover import hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import Param
from quant_core.schemes.verify import absent_params, check_values, linear_params
from quant_modelslim import ModelSlimFormat
from quant_modelslim.description import Description

WEIGHTS, DESCRIPTION = "quant_model_weights.safetensors", "quant_model_description.json"
TYPES = sorted(quant_type for quant_type, layer_type in list_schemes() if layer_type == "linear")
MODULES = ("model.layers.0.q_proj", "model.layers.0.k_proj")
PACKED = {"qk_proj": ["q_proj", "k_proj"]}

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

#: Everything that some type, dialect or addition stores.
SUFFIXES = [
    *("weight", "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "scale_bias", "bias"),
    *("input_scale", "input_offset", "deq_scale", "quant_bias", "weight_dual_scale", "weight_channel_scale", "div"),
    *("left_trans", "right_trans", "clip_ratio", "svd_lowrank_l1", "svd_lowrank_l2", "heads_rotation"),
    *("kronecker_rotation_m", "kronecker_rotation_n", "mul_scale", "strange"),
]

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def sound(quant_type: str, inputs: int, outputs: int) -> Tensors:
    """What the type stores for a module of this size, by its own declarations."""
    query = LayerQuery("m", modules=("m",), sizes=LinearSizes(inputs, (outputs,)))
    planned = ModelSlimFormat(PlannedFolder("/"), Description(DESCRIPTION, {"m.weight": quant_type}))
    scheme = planned.create_scheme_for_layer(query)
    assert isinstance(scheme, AscendLinearScheme)
    return {name: (param.dtype, param.shape) for name, param in scheme.params(inputs, outputs).items()}


# --- changes ----------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32, 33, 48, 63, 64, 96, 128, 512, 2**31])
SHAPES = st.lists(SIZES, max_size=4).map(tuple)


def drop(tensors: Tensors, data: st.DataObject) -> None:
    del tensors[data.draw(st.sampled_from(sorted(tensors)))]


def add(tensors: Tensors, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(SUFFIXES))
    rows, columns = (*tensors.get("weight", (None, ()))[1], 8, 8)[:2]
    shapes = st.sampled_from([(), (1,), (rows,), (rows, 1), (rows, 2), (columns, columns), (rows, 4, 1)])
    tensors[suffix] = data.draw(st.sampled_from(list(DTYPES))), data.draw(shapes | SHAPES)


def retype(tensors: Tensors, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensors[name] = data.draw(st.sampled_from(list(DTYPES))), tensors[name][1]


def reshape(tensors: Tensors, data: st.DataObject) -> None:
    """Another shape, or one with an axis more, less or of another length."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype, shape = tensors[name]
    at = data.draw(st.integers(0, max(0, len(shape) - 1)))
    size = data.draw(SIZES)
    others = [shape[:at], shape[at:], (*shape, 1), (1, *shape), shape[::-1], (*shape[:at], size, *shape[at + 1 :])]
    tensors[name] = dtype, data.draw(st.sampled_from(others) | SHAPES)


def scale(tensors: Tensors, data: st.DataObject) -> None:
    """One axis doubled or halved, as if it were packed or not."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype, shape = tensors[name]
    if shape:
        at, factor = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.sampled_from([0.5, 2, 4]))
        tensors[name] = dtype, (*shape[:at], int(shape[at] * factor), *shape[at + 1 :])


def regroup(tensors: Tensors, data: st.DataObject) -> None:
    """Scales of some other number of groups, in one stage or two."""
    groups = data.draw(st.sampled_from([0, 1, 2, 3, 4, 8, 64, 65]))
    second = data.draw(st.booleans())
    for name in ("weight_scale", "weight_offset"):
        dtype, shape = tensors.get(name, (torch.float32, (8, 1)))
        tensors[f"{name}_second" if second else name] = dtype, (*shape[:1], groups, *shape[2:])


CHANGES = [drop, add, retype, reshape, scale, regroup]


@st.composite
def modules(draw: st.DrawFn, quant_type: str, inputs: int, outputs: int) -> Tensors:
    """A module of a type with up to four changes."""
    tensors = sound(quant_type, inputs, outputs)
    data = draw(st.data())
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=4)):
        if tensors:
            change(tensors, data)
    return tensors


# --- a folder with them -----------------------------------------------------------------------------------------------


def write(folder: Path, quant_type: str, members: list[Tensors]) -> None:
    """Headers, with a sparse file for values."""
    header: dict[str, Any] = {}
    end = 0
    for module, tensors in zip(MODULES, members, strict=False):
        for suffix, (dtype, shape) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            place = [end, end + size]
            header[f"{module}.{suffix}"] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": place}
            end += size
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    described = dict.fromkeys(header, quant_type) | {"version": "1.0.0"}
    described |= {f"{module}.bias": "FLOAT" for module in MODULES if f"{module}.bias" in header}
    (folder / DESCRIPTION).write_text(json.dumps(described))


def values(name: str, param: Param, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that the declaration accepts."""
    generator = torch.Generator().manual_seed(3)
    random = torch.rand(shape, generator=generator) / 100 + 1e-3
    bits = random.view(torch.int32).to(torch.int64) if shape else random.to(torch.int64)
    tried = [random, bits, torch.full(shape, 2), torch.ones(shape), torch.zeros(shape)]
    fit = [v.to(param.dtype) for v in tried if param.check is None or param.check(v.to(param.dtype)) is None]
    assert fit, f"no value that {name} accepts"
    return fit[0]


def serve(scheme: AscendLinearScheme) -> str:
    """Load one rank's part, process it and compute with it."""
    context = scheme.context
    layouts = layouts_of(linear_params(scheme), context)
    absent = layouts_of(absent_params(scheme), context)
    if any(torch.Size(layout.shape).numel() > 2**20 for layout in layouts.values()):
        return "too large to run"
    layer = nn.Module()
    for name, layout in layouts.items():
        value = values(name, layout.param, layout.shape)
        check_values(context.name, [name], layout.param, value)
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    hand_over(layer, layouts.values(), absent.values())
    scheme.process_weights_after_loading(layer)
    inputs = context.input_size // context.partition.input_parts
    y = scheme.apply(layer, torch.ones(3, inputs, dtype=context.params_dtype), None, context.partition.rank)
    assert y.shape == (3, sum(shard.local_output_size for shard in context.shards))
    return "served"


def answer(folder: Path, query: LayerQuery) -> str:
    """What becomes of the folder; whatever is raised must be ours, and name a module or a file."""
    try:
        found = ModelSlimFormat.load(CheckpointFolder(folder)).create_scheme_for_layer(query)
        assert isinstance(found, AscendLinearScheme)
        return serve(found)
    except QuantError as error:
        said = str(error)
        assert any(name in said for name in (*MODULES, query.name, WEIGHTS, DESCRIPTION)), said
        return type(error).__name__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Overwritten at each example."""
    return tmp_path_factory.mktemp("forms")


@pytest.mark.parametrize("quant_type", TYPES)
@settings(max_examples=settings().max_examples * 3 // len(TYPES))  # three times as many as other tests, of all types
@given(data=st.data())
def test_random_forms(quant_type: str, data: st.DataObject, folder: Path) -> None:
    """Of one module, or of two that an engine fuses; with the engine's sizes or without, cut over ranks or whole."""
    inputs, outputs = data.draw(st.sampled_from([32, 64, 128, 512, 1024])), data.draw(st.sampled_from([8, 16, 64]))
    members = [data.draw(modules(quant_type, inputs, outputs))]
    name = MODULES[0]
    if data.draw(st.booleans()):
        members.append(members[0] if data.draw(st.booleans()) else data.draw(modules(quant_type, inputs, outputs)))
        name = "model.layers.0.qk_proj"
    assume(all(math.prod(shape) < 2**38 for member in members for _, shape in member.values()))
    write(folder, quant_type, members)
    kind, ranks = data.draw(st.sampled_from([("replicated", 1), ("row", 2), ("row", 3), ("column", 2), ("column", 4)]))
    local = tuple(outputs // (ranks if kind == "column" else 1) for _ in members)
    sizes = data.draw(st.sampled_from([LinearSizes(inputs, (outputs,) * len(members), local), LinearSizes()]))
    query = LayerQuery(
        name,
        packed_modules=PACKED,
        sizes=sizes,
        params_dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        partition=Partition(kind, data.draw(st.integers(0, ranks - 1)), ranks),
    )
    event(answer(folder, query))


@pytest.mark.parametrize("quant_type", TYPES)
def test_each_tensor_in_each_form(quant_type: str, folder: Path) -> None:
    """One change at a time: the cases that chance may leave out."""
    query = LayerQuery(MODULES[0], sizes=LinearSizes(512, (16,)), params_dtype=torch.float32)
    form = sound(quant_type, 512, 16)
    for name, (dtype, shape) in form.items():
        ranks = [(), (16,), (512,), (1,), (16, 3), (16, 0), (0, 16), (16, 1), (16, 512), (16, 2, 1), (16, 1, 1, 1)]
        others = [(dtype, other) for other in ranks if other != shape]
        others += [(other, shape) for other in DTYPES if other != dtype]
        for other in [None, *others]:
            changed = {suffix: tensor for suffix, tensor in form.items() if suffix != name}
            write(folder, quant_type, [changed if other is None else {**changed, name: other}])
            answer(folder, query)


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_sound_form_is_served(quant_type: str, folder: Path) -> None:
    """Otherwise the other test would prove nothing."""
    write(folder, quant_type, [sound(quant_type, 512, 16)])
    sizes = LinearSizes(512, (16,))
    query = LayerQuery(MODULES[0], sizes=sizes, params_dtype=torch.float32)
    assert answer(folder, query) == "served"
