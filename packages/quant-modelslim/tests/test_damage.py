"""Random damage: a folder is refused by an error that says where, or it computes what its bytes mean by the format.

The meaning is written down here once more, independently and in plain torch: `defects` says what must be refused,
`meaning` what a layer computes. Nothing else may happen, in both directions.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core import CheckpointFolder, LayerQuery, LinearSizes, QuantError, Scheme
from quant_core.schemes.verify import check_values, linear_params
from quant_modelslim import ModelSlimFormat

WEIGHTS, DESCRIPTION = "quant_model_weights.safetensors", "quant_model_description.json"

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
BYTES = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
CODES = torch.arange(-128.0, 128.0)
LINEAR_TYPES = {"W8A8", "W8A8_DYNAMIC", "W8A16"}

#: An engine's layers: fused name, members with their output features, input features.
LAYERS = [
    (f"model.layers.{i}.{parent}.{name}", [(f"model.layers.{i}.{parent}.{m}", n) for m, n in members], inputs)
    for i in range(2)
    for parent, name, members, inputs in [
        ("self_attn", "qkv_proj", [("q_proj", 32), ("k_proj", 16), ("v_proj", 16)], 32),
        ("self_attn", "o_proj", [("o_proj", 32)], 32),
        ("mlp", "gate_up_proj", [("gate_proj", 64), ("up_proj", 64)], 32),
        ("mlp", "down_proj", [("down_proj", 32)], 64),
    ]
]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


# --- what the bytes mean ----------------------------------------------------------------------------------------------


def scales(stored: Tensor) -> Tensor:
    return stored.to(torch.int32).view(torch.float32) if stored.dtype == torch.int64 else stored.to(torch.float32)


def positive(stored: Tensor) -> bool:
    return bool((torch.isfinite(scales(stored)) & (scales(stored) > 0)).all())


def module_defects(kind: str, parts: dict[str, Tensor], sizes: tuple[int, int] | None) -> list[str]:
    """What is wrong with the tensors of one module of a linear type."""
    weight = parts.get("weight")
    if weight is None or weight.dtype != torch.int8 or weight.dim() != 2:
        return ["weight"]
    n, k = weight.shape
    wrong = ["size"] if sizes is not None and (n, k) != sizes else []
    bias = parts.get("bias")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        wrong.append("bias")
    if kind == "W8A8":
        rules = {
            "input_scale": (FLOATS, (1,), positive),
            "input_offset": ({*FLOATS, torch.int8}, (1,), lambda t: bool(torch.isin(t.float(), CODES).all())),
            "deq_scale": ({torch.float32, torch.int64}, (n,), positive),
            "quant_bias": ({torch.int32}, (n,), lambda t: bool((t > -(2**31)).all())),
        }
        optional = {"weight_scale", "weight_offset"}
        wrong += [s for s in optional & parts.keys() if parts[s].dtype not in FLOATS or parts[s].shape != (n, 1)]
    else:
        scale = parts.get("weight_scale")
        groups = scale.shape[1] if scale is not None and scale.dim() == 2 and kind == "W8A16" else 1
        wrong += ["groups"] if not groups or k % groups else []
        symmetric = kind == "W8A8_DYNAMIC"
        rules = {
            "weight_scale": (FLOATS, (n, groups), positive),
            "weight_offset": (FLOATS, (n, groups), lambda t: not t.any() if symmetric else bool(t.isfinite().all())),
        }
        if "weight_offset" not in parts:
            del rules["weight_offset"]
        optional = set()
    wrong += sorted(parts.keys() - rules.keys() - optional - {"weight", "bias"})
    for suffix, (dtypes, shape, usable_values) in rules.items():
        part = parts.get(suffix)
        if part is None or part.dtype not in dtypes or part.shape != shape or not usable_values(part):
            wrong.append(suffix)
    return wrong


def grouped(names: Any) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    for name, value in names.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = value
    return modules


def kind_of(module: str, types: dict[str, str], tensors: dict[str, Tensor]) -> str | None:
    weight = tensors.get(f"{module}.weight")
    return types.get(f"{module}.weight") or ("FLOAT" if weight is not None and weight.dtype in FLOATS else None)


def defects(tensors: dict[str, Tensor], description: object) -> list[str]:
    """Everything for which such a folder must be refused."""
    if not isinstance(description, dict):
        return ["no object"]
    wrong = global_defects({key: value for key, value in description.items() if "." not in key})
    keys = {key: value for key, value in description.items() if "." in key and value is not None}
    wrong += [f"value of {key}" for key, value in keys.items() if not isinstance(value, str) or not value]
    types = {key: value for key, value in keys.items() if isinstance(value, str)}
    wrong += [f"unknown type of {key}" for key, value in types.items() if value not in {*LINEAR_TYPES, "FLOAT"}]
    wrong += [f"attention {key}" for key in types if key.endswith(".quant_type")]
    wrong += [f"absent {key}" for key, value in types.items() if value != "FLOAT" and key not in tensors]
    wrong += [] if types else ["no types"]
    for name, tensor in tensors.items():
        multiplied = name.rpartition(".")[2] in {"weight", "bias"}
        if types.get(name, "FLOAT") == "FLOAT" and (
            tensor.dtype in BYTES or (multiplied and tensor.dtype not in FLOATS)
        ):
            wrong.append(f"no float: {name}")
    modules = grouped(tensors)
    sizes = {module: (n, k) for _, members, k in LAYERS for module, n in members}
    for module, parts in grouped(types).items():
        kind = parts.get("weight")
        others = {t for s, t in parts.items() if s != "weight" and t != "FLOAT"}
        if kind is not None and others - {kind}:
            wrong.append(f"several types: {module}")
        if kind in LINEAR_TYPES:
            wrong += [f"{module}.{p}" for p in module_defects(kind, modules.get(module, {}), sizes.get(module))]
    for name, members, _ in LAYERS:
        wrong += layer_defects(name, [module for module, _ in members], types, tensors, modules)
    return wrong


def global_defects(values: dict[str, Any]) -> list[str]:
    wrong = []
    version = values.get("version")
    if version is not None:
        try:
            wrong += [] if Version(version).major == 1 else ["version"]
        except (InvalidVersion, TypeError):
            wrong.append("version")
    size = values.get("group_size")
    if size is not None and not (type(size) is int and 0 <= size <= 2**20):
        wrong.append("group_size")
    name = values.get("model_quant_type")
    wrong += [] if name is None or isinstance(name, str) else ["model_quant_type"]
    wrong += [key for key in ("metadata", "optional") if not isinstance(values.get(key, {}), dict | None)]
    return wrong


def layer_defects(
    name: str,
    members: list[str],
    types: dict[str, str],
    tensors: dict[str, Tensor],
    modules: dict[str, dict[str, Tensor]],
) -> list[str]:
    there = [module for module in members if module in modules]
    kinds = {kind_of(module, types, tensors) for module in (there or members)}
    if there and there != members:
        return [f"only some members: {name}"]
    if None in kinds or len(kinds) > 1:
        return [f"types of the members: {name} {kinds}"]
    if kinds & LINEAR_TYPES:
        forms = {
            frozenset((s, t.dtype, t.shape[1:]) for s, t in modules.get(module, {}).items() if s != "bias")
            for module in members
        }
        return [f"forms of the members: {name}"] if len(forms) > 1 else []
    return []


def meaning(kind: str, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """What one module computes by the format's formulas, in float64 after the activations are quantised."""
    weight = parts["weight"].double()
    bias = parts["bias"].double() if "bias" in parts else 0.0
    if kind == "W8A8":
        codes = (x / scales(parts["input_scale"]) + parts["input_offset"].float()).round().clamp(-128, 127)
        return (codes.double() @ weight.t() + parts["quant_bias"].double()) * scales(parts["deq_scale"]).double()
    scale = scales(parts["weight_scale"]).double()
    length = weight.shape[1] // scale.shape[1]
    offset = parts["weight_offset"].double() if "weight_offset" in parts else torch.zeros_like(scale)
    real = (weight - offset.repeat_interleave(length, 1)) * scale.repeat_interleave(length, 1)
    if kind == "W8A16":
        return x.double() @ real.t() + bias
    x_scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / x_scale).round().double() @ real.t() * x_scale.double() + bias


# --- what we make of them ---------------------------------------------------------------------------------------------


def serve(folder: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every quantised layer, through the format and the schemes, as an engine wires them."""
    checkpoint = ModelSlimFormat.load(CheckpointFolder(folder))
    results = {}
    for index, (name, members, inputs) in enumerate(LAYERS):
        query = LayerQuery(
            name,
            packed_modules=PACKED,
            sizes=LinearSizes(inputs, tuple(n for _, n in members)),
            params_dtype=torch.float32,
        )
        scheme = checkpoint.create_scheme_for_layer(query)
        if scheme is None:
            continue
        x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(index))
        results[name] = x, run(scheme, [module for module, _ in members], tensors, x)
    return results


def run(scheme: Scheme, modules: list[str], tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    layer = nn.Module()
    for suffix, declared in linear_params(scheme).items():
        parts = [tensors[f"{module}.{suffix}"] for module in modules]
        for part, param in zip(parts, declared, strict=True):
            assert (tuple(part.shape), part.dtype) == (param.shape, param.dtype), "the files were checked before"
        value = torch.cat(parts)
        check_values(scheme.context, suffix, declared[0], value)
        layer.register_parameter(suffix, nn.Parameter(value.clone(), requires_grad=False))
    scheme.process_weights_after_loading(layer)
    sizes = [shard.output_size for shard in scheme.context.shards]
    biases = [tensors.get(f"{module}.bias", torch.zeros(n)) for module, n in zip(modules, sizes, strict=True)]
    return scheme.apply(layer, x, torch.cat([bias.to(torch.float32) for bias in biases]))


def serve_or_refuse(folder: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | QuantError:
    try:
        return serve(folder, tensors)
    except QuantError as error:
        return error


def judge(folder: Path) -> str:
    """Refused exactly if there is a defect, and right otherwise; says which."""
    try:
        description = json.loads((folder / DESCRIPTION).read_bytes(), object_pairs_hook=unique)
        tensors = load_file(folder / WEIGHTS)
        wrong = defects(tensors, description)
    except (ValueError, KeyError, SafetensorError) as error:
        description, tensors, wrong = {}, {}, [f"unreadable: {error}"]
    results = serve_or_refuse(folder, tensors)
    if isinstance(results, QuantError):
        assert wrong, f"sound, but refused: {results}"
        names = {WEIGHTS, DESCRIPTION, *tensors, *description, *grouped(tensors), *(name for name, _, _ in LAYERS)}
        assert any(name and name in str(results) for name in names), f"names no file, tensor or layer: {results}"
        return type(results).__name__
    assert not wrong, f"served in spite of {wrong}"
    modules = grouped(tensors)
    for name, members, _ in LAYERS:
        kinds = {kind_of(module, description, tensors) for module, _ in members}
        assert (name in results) == bool(kinds & LINEAR_TYPES)
        if name in results:
            x, actual = results[name]
            expected = torch.cat([meaning(kind_of(m, description, tensors), modules[m], x) for m, _ in members], dim=1)
            size = float(expected.nan_to_num(0, 0, 0).abs().max())  # a damaged bias may be anything
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * size, equal_nan=True)
    return "served"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


# --- damage -----------------------------------------------------------------------------------------------------------

Damage = Callable[[Any, st.DataObject], None]

TYPES = ["FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A8_DYNAMIC", "w8a8", ""]
VALUES: list[Any] = [*TYPES, None, 3, 1.5, True, [], {"a": 1}]
DTYPES = sorted([*FLOATS, *BYTES, torch.int16, torch.int32, torch.int64, torch.bool], key=str)
RESHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[:-1],
    lambda t: t[:0],
    lambda t: torch.cat([t, t]),
    lambda t: t.t() if t.dim() == 2 else t[None],
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(-1),
    lambda t: t[..., :1],
    lambda t: torch.cat([t, t], dim=-1),
    lambda t: t.reshape(-1)[0],
]


def delete_key(content: Any, data: st.DataObject) -> None:
    del content.description[data.draw(st.sampled_from(sorted(content.description)))]


def delete_tensor(content: Any, data: st.DataObject) -> None:
    del content.tensors[data.draw(st.sampled_from(sorted(content.tensors)))]


def delete_both(content: Any, data: st.DataObject) -> None:
    content.drop(data.draw(st.sampled_from(sorted(content.tensors))))


def delete_module(content: Any, data: st.DataObject) -> None:
    module = data.draw(st.sampled_from(sorted(grouped(content.tensors))))
    for name in [name for name in content.tensors if name.rpartition(".")[0] == module]:
        content.drop(name)


def rename_key(content: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(content.description)))
    content.description[other_name(key, data)] = content.description.pop(key)


def rename_tensor(content: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(content.tensors)))
    content.tensors[other_name(name, data)] = content.tensors.pop(name)


def other_name(name: str, data: st.DataObject) -> str:
    last = name.rpartition(".")[2]
    renamed = [f"{name}x", name.replace(".0.", ".7."), last, f"x.{name}", name.replace("proj", "prj")]
    return data.draw(st.sampled_from([new for new in renamed if new != name]))


def change_value(content: Any, data: st.DataObject) -> None:
    content.description[data.draw(st.sampled_from(sorted(content.description)))] = data.draw(st.sampled_from(VALUES))


def change_module(content: Any, data: st.DataObject) -> None:
    module = data.draw(st.sampled_from(sorted(content.modules())))
    kind = data.draw(st.sampled_from(sorted(LINEAR_TYPES)))
    for key in content.description:
        if key.rpartition(".")[0] == module and not key.endswith(".bias"):
            content.description[key] = kind


def change_global(content: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(["version", "group_size", "metadata", "optional", "model_quant_type", "new_key"]))
    content.description[key] = data.draw(st.sampled_from([*VALUES, "1.2.3", "2.0.0", "next", -1, 64, 2**40, {}]))


def swap_values(content: Any, data: st.DataObject) -> None:
    one, two = (data.draw(st.sampled_from(sorted(content.description))) for _ in range(2))
    content.description[one], content.description[two] = content.description[two], content.description[one]


def change_dtype(content: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(content.tensors)))
    content.tensors[name] = content.tensors[name].to(data.draw(st.sampled_from(DTYPES)))


def change_shape(content: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(content.tensors)))
    if content.tensors[name].dim() and content.tensors[name].numel():
        content.tensors[name] = data.draw(st.sampled_from(RESHAPES))(content.tensors[name]).clone()


def change_number(content: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(n for n in content.tensors if not n.endswith("proj.weight"))))
    tensor = content.tensors[name].clone()
    if tensor.numel():
        numbers: list[float] = [0, 1]
        numbers += [math.nan, math.inf, -math.inf, 1e4, 0.5, -1] if tensor.dtype in FLOATS else []
        numbers += [-(2**31), -1] if tensor.dtype == torch.int32 else []
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.sampled_from(numbers))
    content.tensors[name] = tensor


def swap_tensors(content: Any, data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(sorted(content.tensors)))
    kind = (content.tensors[one].shape, content.tensors[one].dtype)
    two = data.draw(st.sampled_from(sorted(n for n, t in content.tensors.items() if (t.shape, t.dtype) == kind)))
    content.tensors[one], content.tensors[two] = content.tensors[two], content.tensors[one]


def add_tensor(content: Any, data: st.DataObject) -> None:
    module = data.draw(st.sampled_from(sorted(content.modules())))
    suffixes = ["weight_scale", "input_scale", "heads_rotation", "bias", "weight_offset_second"]
    suffix = data.draw(st.sampled_from(suffixes))
    content.tensors.setdefault(f"{module}.{suffix}", torch.ones(data.draw(st.sampled_from([1, 16, 32]))))


DAMAGE: list[Damage] = [
    delete_key,
    delete_tensor,
    delete_both,
    delete_module,
    rename_key,
    rename_tensor,
    change_value,
    change_module,
    change_global,
    swap_values,
    change_dtype,
    change_shape,
    change_number,
    swap_tensors,
    add_tensor,
]


def test_the_sound_folder_is_served(tmp_path: Path, small: Any) -> None:
    """Otherwise the other tests would prove nothing."""
    folder = small.write(tmp_path)
    assert defects(small.tensors, small.description) == []
    assert len(serve(folder, small.tensors)) == 6  # two layers of four, without the float gate_up and down
    assert judge(folder) == "served"


@given(data=st.data())
def test_damaged_content(data: st.DataObject, tmp_path: Path, new_content: Callable[[], Any]) -> None:
    """One to three changes of names, types, dtypes, shapes and values."""
    content = new_content()
    for damage in data.draw(st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3)):
        damage(content, data)
    event(judge(content.write(tmp_path)))


@given(data=st.data())
def test_damaged_bytes(data: st.DataObject, tmp_path: Path, new_content: Callable[[], Any]) -> None:
    """A byte changed or the end cut off, in the description or in the header of the weights."""
    folder = new_content().write(tmp_path)
    file = folder / data.draw(st.sampled_from([WEIGHTS, DESCRIPTION]))
    content = bytearray(file.read_bytes())
    end = len(content) if file.name == DESCRIPTION else 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, end - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789.,:"{}[]ABFIU_')))
    file.write_bytes(content)
    event(judge(folder))


@pytest.mark.parametrize("damage", ["key", "tensor", "both", "shape", "dtype"])
def test_every_tensor(tmp_path: Path, new_content: Callable[[], Any], damage: str) -> None:
    """Each tensor and key absent, cut, or converted once: the cases that chance may leave out."""
    refused = 0
    for name in sorted(new_content().tensors):
        content = new_content()
        if damage in {"key", "both"}:
            del content.description[name]
        if damage in {"tensor", "both"}:
            del content.tensors[name]
        if damage == "shape":
            content.tensors[name] = content.tensors[name][:-1].clone()
        if damage == "dtype":
            content.tensors[name] = content.tensors[name].to(torch.uint8)
        verdict = judge(content.write(tmp_path))
        quantised = content.description.get(name.rpartition(".")[0] + ".weight", "FLOAT") != "FLOAT"
        if damage in {"tensor", "shape", "dtype"} and quantised and not name.endswith(".bias"):
            assert verdict != "served", name
            refused += 1
    assert refused > 10 or damage in {"key", "both"}


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_cut_weights(tmp_path: Path, small: Any, kept: int) -> None:
    """A download that broke off, at every kind of place."""
    file = small.write(tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(QuantError, match=re.escape(WEIGHTS)):
        ModelSlimFormat.load(CheckpointFolder(tmp_path))
