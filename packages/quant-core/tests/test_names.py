"""From an engine's names to a checkpoint's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_core import LayerResolutionError
from quant_core.names import ModuleNames

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

COMPONENT = st.text("abcq_proj0123456789", min_size=1, max_size=8)


def test_a_module_under_its_own_name() -> None:
    names = ModuleNames.renamed(["model.layers.0.mlp.down_proj"])
    assert names.find("model.layers.0.mlp.down_proj", PACKED) == ("model.layers.0.mlp.down_proj",)
    assert names.find("model.layers.1.mlp.down_proj", PACKED) == ()


def test_a_fused_module_is_found_by_its_members_in_order() -> None:
    names = ModuleNames.renamed(["a.v_proj", "a.k_proj", "a.q_proj"])
    assert names.find("a.qkv_proj", PACKED) == ("a.q_proj", "a.k_proj", "a.v_proj")


def test_a_module_that_is_fused_on_disk_comes_first() -> None:
    names = ModuleNames.renamed(["a.qkv_proj", "a.q_proj"])
    assert names.find("a.qkv_proj", PACKED) == ("a.qkv_proj",)


def test_a_name_of_one_component() -> None:
    names = ModuleNames.renamed(["q_proj", "k_proj", "v_proj", "lm_head"])
    assert names.find("qkv_proj", PACKED) == ("q_proj", "k_proj", "v_proj")
    assert names.find("lm_head", PACKED) == ("lm_head",)


def test_names_are_compared_by_component() -> None:
    """`layers.1` is no prefix of `layers.10`, and `my_qkv_proj` is not `qkv_proj`."""
    names = ModuleNames.renamed(["layers.10.q_proj", "layers.10.k_proj", "layers.10.v_proj"])
    assert names.find("layers.1.qkv_proj", PACKED) == ()
    assert names.find("layers.10.my_qkv_proj", PACKED) == ()
    assert names.find("qkv_proj.x", PACKED) == ()


def test_the_engine_s_names_are_asked_and_the_checkpoint_s_are_answered() -> None:
    def rename(name: str) -> str | None:
        return None if name.startswith("visual.") else name.replace("model.language_model.", "language_model.model.", 1)

    names = ModuleNames.renamed(
        ["model.language_model.0.q_proj", "model.language_model.0.k_proj", "visual.q_proj"], rename
    )
    packed = {"qk": ["q_proj", "k_proj"]}
    assert names.find("language_model.model.0.qk", packed) == (
        "model.language_model.0.q_proj",
        "model.language_model.0.k_proj",
    )
    assert names.find("model.language_model.0.q_proj", packed) == ()
    assert names.find("visual.q_proj", packed) == ()


@pytest.mark.parametrize("absent", ["q_proj", "k_proj", "v_proj"])
def test_a_fused_module_with_an_absent_member(absent: str) -> None:
    there = [f"a.{member}" for member in PACKED["qkv_proj"] if member != absent]
    with pytest.raises(LayerResolutionError) as raised:
        ModuleNames.renamed(there).find("a.qkv_proj", PACKED)
    assert "a.qkv_proj" in str(raised.value)
    assert f"expected: also a.{absent}" in str(raised.value)
    assert f"found: {there[0]}, {there[1]}" in str(raised.value)


@given(st.lists(st.lists(COMPONENT, min_size=1, max_size=4).map(".".join), unique=True, max_size=12))
def test_every_module_finds_itself_and_nothing_else(modules: list[str]) -> None:
    names = ModuleNames.renamed(modules)
    for module in modules:
        assert names.find(module, {}) == (module,)
        assert names.find(f"{module}.x.y.z.w", {}) == ()


def test_the_first_complete_mapping_counts() -> None:
    """A mapping that lacks a member is no reason to give up: another one may be complete."""
    names = ModuleNames.renamed(["a.k", "a.v"])
    lacking, complete = {"kv": ["k", "v", "absent"]}, {"kv": ["k", "v"]}
    assert names.members("a.kv", lacking, complete) == (("a.k", "a.v"), ())
    assert names.members("a.kv", lacking) == (("a.k", "a.v"), ("a.absent",))


def test_a_table_may_have_several_modules_for_a_name() -> None:
    names = ModuleNames({"a.qkv": ("a.q", "a.k", "a.k"), "a.up": ("a.up_1", "a.up_2")})
    assert names.find("a.qkv") == ("a.q", "a.k", "a.k")
    assert names.find("a.gate_up", {"gate_up": ["up"]}) == ("a.up_1", "a.up_2")


@pytest.mark.parametrize(
    ("stored", "absent"),
    [
        (("x.gate",), ("x.up",)),
        (("x.up",), ("x.gate",)),
        (("x.gate", "x.up"), ()),
        (("x.gate_up",), ()),  # fused on disk
        (("x.other",), ()),
        (("x.gate", "x.gate"), ()),  # loaded into both
    ],
)
def test_absent_members_of_a_table_s_module(stored: tuple[str, ...], absent: tuple[str, ...]) -> None:
    """By the checkpoint's names, whatever the engine's parent is."""
    names = ModuleNames({"m.gate_up": stored})
    assert names.members("m.gate_up", {"gate_up": ["gate", "up"]}) == (stored, absent)
