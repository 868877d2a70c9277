"""Where a loader puts a checkpoint's modules: by renames and fusions that a model gives as data, or by asking it."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import WeightsMapper

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from versions import lacking

from quant_core import StoredForm
from quant_core.stored import StoredTensor
from vllm_ascend_quant.placement.paths import ModelPaths, Renames, in_shard_order
from vllm_ascend_quant.placement.probing import ask_loader

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


fusing = pytest.mark.skipif(bool(lacking("mappers that fuse")), reason=lacking("mappers that fuse"))


def tree(*paths: str) -> nn.Module:
    """Modules at these paths, with nothing in them."""
    root = nn.Module()
    for path in paths:
        here = root
        for part in path.split("."):
            if part not in dict(here.named_children()):
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
    return root


def give(model: nn.Module, path: str = "", **attributes: Any) -> nn.Module:
    """Set attributes of the module at a path."""
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)
    return model


def test_a_module_is_found_under_its_own_name() -> None:
    paths = ModelPaths(tree("model.o_proj"), ["model.o_proj"])
    assert paths.members("model.o_proj", {}) == (("model.o_proj",), ())


def test_members_come_in_the_order_of_the_mapping() -> None:
    modules = ["m.v_proj", "m.k_proj", "m.q_proj"]
    assert ModelPaths(tree("m.qkv_proj"), modules).members("m.qkv_proj", QKV) == (
        ("m.q_proj", "m.k_proj", "m.v_proj"),
        (),
    )


def test_a_module_fused_on_disk_comes_before_the_mapping() -> None:
    paths = ModelPaths(tree("m.gate_up_proj"), ["m.gate_up_proj"])
    assert paths.members("m.gate_up_proj", QKV) == (("m.gate_up_proj",), ())


def test_absent_members_are_told() -> None:
    found, absent = ModelPaths(tree("m.qkv_proj"), ["m.q_proj", "m.k_proj"]).members("m.qkv_proj", QKV)
    assert (found, absent) == (("m.q_proj", "m.k_proj"), ("m.v_proj",))


def test_the_nearest_complete_mapping_counts() -> None:
    """A mapping that lacks a member is no reason to give up: another one around the layer may be complete."""
    model = give(tree("outer.inner.kv"), "outer", packed_modules_mapping={"kv": ["k", "v"]})
    give(model, "outer.inner", packed_modules_mapping={"kv": ["k", "v", "absent"]})
    paths = ModelPaths(model, ["outer.inner.k", "outer.inner.v"])
    assert paths.members("outer.inner.kv", {}) == (("outer.inner.k", "outer.inner.v"), ())


def test_no_substring_is_taken_for_a_name() -> None:
    paths = ModelPaths(tree("m.o_proj"), ["m.o_proj_extra", "xm.o_proj", "m.o_proj.linear"])
    assert paths.members("m.o_proj", QKV) == ((), ())


def test_renames_of_the_model_itself() -> None:
    mapper = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model.", "model.visual.": None})
    model = give(tree("language_model.model.up"), hf_to_vllm_mapper=mapper)
    paths = ModelPaths(model, ["model.language_model.up", "model.visual.up"])
    assert paths.members("language_model.model.up", {}) == (("model.language_model.up",), ())
    assert paths.paths_of("model.visual.up") == []


def test_renames_level_by_level() -> None:
    """A child's mapper sees names without the path to it, after its parents' mappers."""
    model = give(tree("language_model.layers.0.mamba.in_proj"))
    give(model, hf_to_vllm_mapper=WeightsMapper(orig_to_new_prefix={"llm.": "language_model."}))
    give(model, "language_model", hf_to_vllm_mapper=WeightsMapper(orig_to_new_substr={"mixer": "mamba"}))
    paths = ModelPaths(model, ["llm.layers.0.mixer.in_proj"])
    assert paths.members("language_model.layers.0.mamba.in_proj", {}) == (("llm.layers.0.mixer.in_proj",), ())


def test_a_rename_is_applied_once_at_each_level() -> None:
    mapper = WeightsMapper(orig_to_new_substr={"mamba": "mamba.mamba"})
    model = give(tree("layers.0.mamba.mamba.in_proj"), hf_to_vllm_mapper=mapper)
    assert ModelPaths(model, ["layers.0.mamba.in_proj"]).paths_of("layers.0.mamba.in_proj") == [
        "layers.0.mamba.mamba.in_proj"
    ]


@fusing
def test_shards_of_stacked_renames() -> None:
    stacked = {f".{shard}_proj": (".qkv_proj", shard) for shard in "vkq"}
    model = give(tree("m.qkv_proj"), "m", hf_to_vllm_mapper=WeightsMapper(orig_to_new_stacked=stacked))
    paths = ModelPaths(model, ["m.x.v_proj", "m.x.k_proj", "m.x.q_proj"])
    assert paths.members("m.x.qkv_proj", {}) == (("m.x.q_proj", "m.x.k_proj", "m.x.v_proj"), ())


@fusing
def test_a_module_that_is_loaded_into_two_members() -> None:
    """The shard id may be a list: this model uses its keys as values."""
    stacked = {".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", ["k", "v"])}
    model = give(tree("m.qkv_proj"), hf_to_vllm_mapper=WeightsMapper(orig_to_new_stacked=stacked))
    paths = ModelPaths(model, ["m.k_proj", "m.q_proj"])
    assert paths.members("m.qkv_proj", {}) == (("m.q_proj", "m.k_proj", "m.k_proj"), ())


@fusing
def test_a_module_that_is_cut_into_several_members() -> None:
    """The shard id may be a tuple: one module for the first three members, another for the last."""
    stacked = {".in_z": (".in_all", 3), ".in_qkv": (".in_all", (0, 1, 2))}
    model = give(tree("m.in_all"), hf_to_vllm_mapper=WeightsMapper(orig_to_new_stacked=stacked))
    assert ModelPaths(model, ["m.in_z", "m.in_qkv"]).members("m.in_all", {}) == (("m.in_qkv", "m.in_z"), ())


def test_order_of_shards() -> None:
    assert in_shard_order([(1, "b"), ((0,), "a"), (None, "0")]) == ("a", "0", "b")
    assert in_shard_order([("v", "c"), ("q", "a"), ("k", "b")]) == ("a", "b", "c")


def test_modules_below_a_path() -> None:
    paths = ModelPaths(tree("m.experts"), ["m.experts.0.w1", "m.experts.1.w1", "m.experts_2.w1", "m.gate"])
    assert paths.below(["m.experts"]) == {"m.experts": ["m.experts.0.w1", "m.experts.1.w1"]}


def work(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many names are renamed and how many look-ups are made for a model of so many layers."""
    count = 0
    mapping = "_map_name_with_shard" if hasattr(WeightsMapper, "_map_name_with_shard") else "_map_name"
    original = getattr(WeightsMapper, mapping)

    def counting(self: WeightsMapper, key: str) -> Any:
        nonlocal count
        count += 1
        return original(self, key)

    class Modules(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            nonlocal count
            count += 1
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            nonlocal count
            count += 1
            return super().__contains__(key)

    names = [f"model.layers.{i}.{name}" for i in range(layers) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    fused = [f"model.layers.{i}.{name}" for i in range(layers) for name in ("qkv_proj", "o_proj")]
    model = give(tree(*fused), "model", hf_to_vllm_mapper=WeightsMapper(orig_to_new_substr={"nothing": "else"}))
    with monkeypatch.context() as patch:
        patch.setattr(WeightsMapper, mapping, counting)
        renames = Renames(model)
        renames._modules = Modules(renames._modules)
        for name in names:
            list(renames.places(name))
        paths = ModelPaths(model, names)
        paths._packed = Modules(paths._packed)
        for path in fused:
            paths.members(path, QKV)
    return count


def test_cost_grows_with_the_number_of_modules_only(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = work(10, monkeypatch), work(100, monkeypatch)
    assert many <= 10.5 * few


class Secretive(nn.Module):
    """Fuses in code only, renames on the way, drops what it does not want, and refuses what it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(4, 8, bias=False)
        self.other = nn.Linear(4, 4, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        params = dict(self.named_parameters())
        for name, weight in weights:
            if name.startswith("draft."):
                continue
            for part, shard in (("b", 1), ("a", 0)):
                if name == f"disk.{part}.weight":
                    params["fused.weight"].weight_loader(params["fused.weight"], weight, shard)
                    break
            else:
                param = params[name]
                getattr(param, "weight_loader", lambda p, w: p.data.copy_(w))(param, weight)
        return set()


def form(module: str) -> StoredForm:
    return StoredForm(module, {"weight": StoredTensor(f"{module}.weight", (4, 4), torch.int8, "file")})


def test_a_loader_tells_what_it_does_in_code() -> None:
    model = Secretive()
    before = dict(model.named_parameters())
    values = {name: param.detach().clone() for name, param in before.items()}
    asked = [form(module) for module in ("disk.b", "draft.a", "nowhere", "other", "disk.a")]
    answer = ask_loader(model, {"fused": model.fused, "other": model.other}, asked)
    assert answer.stored_at == {"fused": ("disk.a", "disk.b"), "other": ("other",)}
    assert list(answer.refused) == ["nowhere"]
    assert "KeyError" in answer.refused["nowhere"]
    assert all(param is before[name] for name, param in model.named_parameters()), "the real parameters are back"
    assert all(torch.equal(param, values[name]) for name, param in model.named_parameters())


class Collecting(Secretive):
    """Looks at all tensors before it loads the first one."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(list(weights))


def test_a_loader_that_collects_first() -> None:
    model = Collecting()
    asked = [form(module) for module in ("disk.b", "other", "disk.a", "draft.a")]
    answer = ask_loader(model, {"fused": model.fused, "other": model.other}, asked)
    assert answer.stored_at == {"fused": ("disk.a", "disk.b"), "other": ("other",)}
