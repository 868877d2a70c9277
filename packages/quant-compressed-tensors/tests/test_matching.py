"""Which groups a module belongs to, compared with the library's own matching; and in which time."""

import re
import time
import warnings

import pytest
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from quant_compressed_tensors.matching import Match, Matcher
from quant_core import CheckpointError

PLACE = "quantization_config"


class Narrow(nn.Linear):
    """A class below another that targets name."""


#: Modules of the classes that occur, without weights that would take time.
MODULES = [nn.Linear(1, 1), nn.Embedding(1, 1), Narrow(1, 1), nn.LayerNorm(1)]

WORDS = ["model", "layers", "0", "1", "10", "mlp", "gate", "gate_proj", "gate_up_proj", "experts", "lm_head", "Linear"]
NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)

PIECES = [*WORDS, ".*", r"\.", ".", r"\d+", r"\w*", "(gate|up)_proj", "[01]", "$", "^", "(?i:MLP)", "(?!gate)", "_?"]
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(lambda parts: "re:" + "".join(parts))
CLASSES = st.sampled_from(["Linear", "Embedding", "Narrow", "Module", "LayerNorm", "Attention"])
TARGETS = st.lists(st.one_of(NAMES, PATTERNS, CLASSES), max_size=4)


def valid(entries: list[str]) -> bool:
    for entry in entries:
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error:
            return False
    return True


def classes_of(module: nn.Module) -> list[str]:
    """Those by which the library matches, in its order: alphabetical."""
    return sorted(cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module))


# --- the library's rule -----------------------------------------------------------------------------------------------


@given(st.lists(TARGETS.filter(valid), min_size=1, max_size=4), st.sampled_from(MODULES), NAMES)
@example([["Linear"], ["Linear"], ["Embedding"]], MODULES[0], "model.layers.0.mlp.gate_proj")
@example([["Narrow"], ["Linear"], ["re:.*gate"], ["gate"]], MODULES[2], "gate")
def test_groups_are_those_of_the_library(groups: list[list[str]], module: nn.Module, name: str) -> None:
    """In its order, over the targets of all groups at once; of one target in two groups, the last counts."""
    targets = {f"group_{index}": entries for index, entries in enumerate(groups)}
    owners = {target: group for group, entries in targets.items() for target in entries}
    expected = [Match(owners[target], target) for target in match_targets(name, module, list(owners))]
    assert Matcher(targets, [], PLACE).groups(name, classes_of(module)) == expected


@given(TARGETS.filter(valid), st.sampled_from(MODULES), NAMES)
def test_what_is_ignored_is_what_the_library_ignores(ignore: list[str], module: nn.Module, name: str) -> None:
    found = Matcher({}, ignore, PLACE).ignored(name, classes_of(module))
    assert (found is not None) == is_match(name, module, ignore)
    assert found is None or found in ignore


@pytest.mark.parametrize(
    ("entry", "module", "matches"),
    [
        ("re:.*gate", "model.layers.0.mlp.gate_proj", True),  # not anchored at the end
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", False),
        ("re:gate", "model.layers.0.mlp.gate", False),  # but at the start
        ("re:layers", "model.layers.0.mlp.gate", False),
        ("gate", "model.layers.0.mlp.gate", False),  # a name is a whole name
        ("model.layers.0.mlp", "model.layers.0.mlp.gate", False),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gat.", "model.layers.0.mlp.gate", False),  # and no pattern
        ("re:", "anything", True),
    ],
)
def test_names_and_patterns(entry: str, module: str, matches: bool) -> None:
    matcher = Matcher({"group_0": [entry]}, [entry], PLACE)
    assert matcher.matches(entry, module) == matches
    assert bool(matcher.groups(module, ())) == matches
    assert (matcher.ignored(module, ()) == entry) == matches


def test_tiers_before_the_alphabet() -> None:
    """A name before a pattern, a pattern before a class, whatever the order of the file."""
    name = "model.layers.0.mlp.gate_proj"
    targets = {"a": ["Linear"], "b": ["re:.*z"], "c": ["re:.*gate"], "d": ["re:.*_proj"], "e": [name]}
    assert [match.group for match in Matcher(targets, [], PLACE).groups(name, ["Linear"])] == ["e", "d", "c", "a"]


def test_of_one_target_in_two_groups_the_last_counts() -> None:
    matcher = Matcher({"group_0": ["Linear"], "group_1": ["Linear"], "group_10": ["lm_head"]}, [], PLACE)
    assert matcher.groups("lm_head", ["Linear"]) == [Match("group_10", "lm_head"), Match("group_1", "Linear")]


def test_the_classes_of_a_module_come_in_the_order_that_is_asked() -> None:
    """Experts are `MoEGMM` before they are `Linear`, which no alphabet says."""
    matcher = Matcher({"group_0": ["Linear"], "group_1": ["MoEGMM"]}, [], PLACE)
    assert [match.group for match in matcher.groups("e", ["MoEGMM", "Linear"])] == ["group_1", "group_0"]


# --- patterns that are wrong, or hostile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["re:*.mlp", "re:(", "re:[z-a]", r"re:\p{Lu}", "re:(?P<a>x)(?P<a>y)", "re:" + "(" * 5000]
)
@pytest.mark.parametrize("place", ["targets", "ignore"])
def test_what_is_no_pattern(pattern: str, place: str) -> None:
    targets = {"group_7": [pattern]} if place == "targets" else {}
    with pytest.raises(CheckpointError) as raised:
        Matcher(targets, [] if targets else [pattern], PLACE)
    message = str(raised.value)
    assert "config.json has a pattern that is no regular expression" in message
    assert repr(pattern[:200])[:-1] in message
    key = "config_groups.group_7.targets" if targets else "ignore"
    assert f"where: config.json: {PLACE}.{key}\n" in message
    assert "what to do: correct the pattern" in message


def test_patterns_that_python_warns_of_are_patterns() -> None:
    """What the writer's Python took with a warning is no error, and no warning of ours, here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matcher = Matcher({"group_0": ["re:[[a]b", "re:x[a||b]"]}, [], PLACE)
    assert caught == []
    assert matcher.groups("[b", ()) == [Match("group_0", "re:[[a]b")]


HOSTILE = [r"re:((\w|\w\w|[.])+)+[A-Z]", "re:(.|..|...)*[A-Z]", r"re:(?:[a-z_]|[a-z0-9]{1,2}|\.)*[A-Z]$"]
LONG = "model.layers.0.self_attn.a_rather_long_name_of_a_projection_that_a_pattern_can_be_slow_with"


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("place", ["targets", "ignore"])
def test_hostile_patterns(pattern: str, place: str) -> None:
    """Refused within seconds: Python's own `re` takes hours or centuries for some of them."""
    matcher = Matcher({"group_7": [pattern]} if place == "targets" else {}, [pattern] * (place == "ignore"), PLACE)
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as raised:
        matcher.groups(LONG, ()) if place == "targets" else matcher.ignored(LONG, ())
    assert time.perf_counter() - started < 5
    message = str(raised.value)
    for said in (repr(pattern), f"the name {LONG}", "nested repetitions", "what to do: write it more simply"):
        assert said in message
    assert f"{PLACE}.{'config_groups.group_7.targets' if place == 'targets' else 'ignore'}\n" in message


def test_a_pattern_that_is_slow_with_every_name() -> None:
    """Each takes a part of a second, and there are tens of thousands of names: the whole is bounded too."""
    matcher = Matcher({}, ["re:(x|y|xy)*[A-Z]"], PLACE)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"takes longer than 5.0 seconds with the names of this model"):
        all(matcher.ignored("xy" * 17, ()) is None for _ in range(10_000))
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "pattern",
    [
        "re:" + "a" * 2_000_000,
        "re:" + "(a|b)" * 200_000,
        "re:((a{1000}){1000}){1000}",
        "re:(((a{1,500}){500}){500}){500}",
        "re:a{99999999999999999999}",
    ],
)
def test_patterns_that_would_fill_the_memory(pattern: str) -> None:
    """While a pattern is compiled, no limit of time holds, and `regex` takes gigabytes for the third."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="a pattern of a size that would fill the memory") as raised:
        Matcher({"group_7": [pattern]}, [], PLACE)
    assert time.perf_counter() - started < 5
    assert f"{PLACE}.config_groups.group_7.targets" in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_patterns_with_counts_are_patterns() -> None:
    Matcher(
        {"group_0": [r"re:model\.layers\.\d{1,3}\.mlp\.experts\.\d{1,4}\.(up|gate)_proj{1}"]}, ["re:a{,3}b{2,}"], PLACE
    )


def test_many_names_cost_one_look_up() -> None:
    """Writers list what is ignored name by name, and models have tens of thousands of modules."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(50) for j in range(400)]
    matcher = Matcher({"group_0": names, "group_1": ["Linear"]}, names, PLACE)
    started = time.process_time()
    for name in names:
        assert matcher.ignored(name, ()) == name
        assert matcher.groups(name, ["Linear"])[0] == Match("group_0", name)
    assert time.process_time() - started < 5  # 20,000 × 20,000 comparisons would take minutes
