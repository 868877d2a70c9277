"""From a module to its group: by the section, and where that is silent or ambiguous by what is stored."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from small_folders import (
    FP8,
    FP8_TOKEN,
    INT4,
    INT8,
    INT8_STATIC,
    INT8_TOKEN,
    Arguments,
    arguments,
    asymmetric,
    group,
    grouped,
    section,
    stored,
)
from torch import Tensor

from quant_compressed_tensors.resolve import Answer, Resolver
from quant_compressed_tensors.section import Section
from quant_compressed_tensors.stating import SUFFIXES
from quant_core import LayerQuery, LayerResolutionError, LoadError, StoredForm, StoredTensor, UnsupportedSchemeError

NAME = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.7.up_proj"
FLOAT = {"weight": torch.ones(128, 128, dtype=torch.bfloat16)}


def resolver(*groups: dict[str, Any], ignore: Iterable[str] = (), **more: Any) -> Resolver:
    from compressed_tensors.quantization import QuantizationConfig

    raw = section(*groups, ignore=ignore, **more)
    parsed = QuantizationConfig.model_validate(raw)
    return Resolver(Section("quantization_config", parsed.config_groups, tuple(ignore), raw["format"], None, raw))


def form(tensors: dict[str, Tensor], module: str = NAME) -> StoredForm:
    """A module as a format gives it: canonical suffixes, and the format's own spelling for messages."""
    headers = {}
    for suffix, tensor in tensors.items():
        canonical = SUFFIXES.get(suffix, suffix)
        if canonical is not None:
            headers[canonical] = StoredTensor(f"{module}.{suffix}", tuple(tensor.shape), tensor.dtype, "w.safetensors")
    return StoredForm(module, headers, spelling={"weight": "weight_packed"} if "weight_packed" in tensors else {})


def asked(
    groups: Resolver, tensors: dict[str, Tensor] | None = None, module: str = NAME, layer_class: str = "Linear"
) -> Answer:
    """What an engine is told of a module."""
    found = StoredForm(module) if tensors is None else form(tensors, module)
    return groups.of(found, LayerQuery(module, layer_class=layer_class))


# --- one group --------------------------------------------------------------------------------------------------------


def test_a_quantised_module() -> None:
    answer = asked(resolver(), stored())
    assert (answer.quant_type, answer.group) == ("W8A8_DYNAMIC", "group_0")
    assert str(answer.evidence) == "config.json: quantization_config.config_groups.group_0 = Linear"
    assert answer.reason == "group_0, by 'Linear'"
    assert answer.form.weight is not None
    assert answer.form.input is not None


def test_a_float_module_that_a_target_matches() -> None:
    """Routers, heads of MTP and embeddings of real models are listed nowhere: what is stored tells."""
    answer = asked(resolver(), FLOAT)
    assert (answer.quant_type, answer.group) == (None, "group_0")
    assert answer.reason == "its weight is float, though 'Linear' matches"
    assert str(answer.evidence) == "config.json: quantization_config.config_groups.group_0 = Linear"


def test_a_float_module_that_is_ignored() -> None:
    answer = asked(resolver(ignore=["re:.*up_proj$"]), FLOAT)
    assert (answer.quant_type, answer.group) == (None, None)
    assert str(answer.evidence) == "config.json: quantization_config.ignore = re:.*up_proj$"
    assert answer.reason == "ignored by 're:.*up_proj$'"


def test_a_float_module_that_nothing_matches() -> None:
    answer = asked(resolver(group(targets=["re:.*attn"])), FLOAT)
    assert (answer.quant_type, answer.reason) == (None, "no target matches")


@pytest.mark.parametrize("entry", [NAME, "re:.*up_proj$", "Linear"])
def test_a_quantised_module_that_is_ignored(entry: str) -> None:
    with pytest.raises(LayerResolutionError) as raised:
        asked(resolver(ignore=[entry]), stored())
    message = str(raised.value)
    for said in (
        f"{NAME} is stored quantised, but it matches {entry!r} in quantization_config.ignore",
        "where: config.json: quantization_config",
        f"found: {NAME}.weight (int8 in w.safetensors), {NAME}.weight_scale (bfloat16 in w.safetensors)",
        "what to do: take config.json and weights from one run of the tool",
    ):
        assert said in message


@pytest.mark.parametrize("targets", [[], ["re:.*attn"], ["Embedding"], ["model.layers.0.mlp"], ["lm_head"]])
@pytest.mark.parametrize("engine", [True, False])
def test_a_quantised_module_that_nothing_matches(targets: list[str], engine: bool) -> None:
    """Without an engine too, unless a target is the name of a class, which only the engine knows."""
    groups = resolver(group(targets=targets))
    if not engine and targets in (["Embedding"], ["lm_head"]):
        assert groups.of(form(stored())).quant_type == "W8A8_DYNAMIC"
        return
    with pytest.raises(LayerResolutionError, match=f"{NAME} is stored quantised, but it matches no target"):
        asked(groups, stored()) if engine else groups.of(form(stored()))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_zero_point", "input_scale", "weight_g_idx"])
def test_a_float_weight_beside_anything_of_a_quantised_one(suffix: str) -> None:
    """As `save_compressed=False` leaves them: which of both was computed with, nobody can tell."""
    with pytest.raises(LoadError) as raised:
        asked(resolver(), {**FLOAT, suffix: torch.ones(1)})
    message = str(raised.value)
    for said in (NAME, "stored in float", "config_groups.group_0", f"{NAME}.{suffix}", "save_compressed=True"):
        assert said in message
    assert asked(resolver(), FLOAT).quant_type is None


def test_a_fused_neighbour_is_not_silenced() -> None:
    """Names are unfused: a pattern for a router does not reach gate_up_proj, as it does in vLLM."""
    groups = resolver(ignore=["re:model.layers.0.mlp.gate$", "re:model.layers.0.mlp.gate"])
    assert asked(groups, FLOAT, "model.layers.0.mlp.gate").quant_type is None
    assert asked(groups, stored(), "model.layers.0.mlp.up_proj").quant_type == "W8A8_DYNAMIC"
    with pytest.raises(LayerResolutionError):  # but it is a pattern without an end
        asked(groups, stored(), "model.layers.0.mlp.gate_proj")


# --- several groups ---------------------------------------------------------------------------------------------------


def test_a_name_before_a_pattern_before_a_class() -> None:
    """Where the tensors fit all of them, as a byte holds four bits and eight."""
    groups = [
        group(),
        group(INT4, targets=["re:.*up_proj"]),
        group(INT4, {**INT8_TOKEN, "num_bits": 4}, targets=[NAME]),
    ]
    assert asked(resolver(*groups), stored()).quant_type == "W4A4_DYNAMIC"
    assert asked(resolver(*groups[:2]), stored()).quant_type == "W4A8_DYNAMIC"
    assert asked(resolver(*groups[:1]), stored()).quant_type == "W8A8_DYNAMIC"
    assert asked(resolver(*reversed(groups)), stored()).quant_type == "W4A4_DYNAMIC"


def test_of_one_target_in_two_groups_the_last_counts() -> None:
    assert asked(resolver(group(), group(INT4)), stored()).quant_type == "W4A8_DYNAMIC"
    assert asked(resolver(group(INT4), group()), stored()).quant_type == "W8A8_DYNAMIC"


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        (INT8, INT8_TOKEN, ("group_0", "W8A8_DYNAMIC")),
        (grouped(INT4), None, ("group_1", "W4A16")),
        (FP8, FP8_TOKEN, ("group_2", "WFP8AFP8_DYNAMIC")),
        (grouped(INT8, 64), INT8_TOKEN, ("group_10", "W8A8_DYNAMIC")),
    ],
)
def test_stored_tensors_confirm_the_choice(
    weights: Arguments, inputs: Arguments | None, expected: tuple[str, str]
) -> None:
    """The order of groups is lost in files with sorted keys, and writers differ in what they take first."""
    groups = {
        "group_0": group(INT8, INT8_TOKEN, ["Linear"]),
        "group_1": group(grouped(INT4), None, ["re:.*up_proj"]),
        "group_10": group(grouped(INT8, 64), INT8_TOKEN, ["re:.*mlp"]),
        "group_2": group(FP8, FP8_TOKEN, ["re:.*_proj"]),
    }
    raw = section(config_groups=groups)
    answer = asked(resolver(**{"config_groups": raw["config_groups"]}), stored(weights, inputs))
    assert (answer.group, answer.quant_type) == expected
    assert answer.evidence.key == f"quantization_config.config_groups.{expected[0]}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (stored(grouped(INT4, 64), None), stored(grouped(INT4, 32), None)),  # the shape of the scales
        (stored(asymmetric(grouped(INT4)), None), stored(grouped(INT4, 32), None)),  # a tensor
    ],
)
def test_what_confirms(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    special = group(grouped(INT4, 64) if "weight_zero_point" not in first else asymmetric(grouped(INT4)), None, [NAME])
    groups = resolver(special, group(grouped(INT4), None))
    assert asked(groups, first).group == "group_0"
    assert asked(groups, second).group == "group_1"


def test_none_of_several_groups_fits() -> None:
    groups = resolver(group(), group(grouped(INT4, 64), None, ["re:.*up_proj"]), group(INT4, FP8_TOKEN, [NAME]))
    with pytest.raises(LoadError) as raised:
        asked(groups, stored(FP8, FP8_TOKEN))
    message = str(raised.value)
    assert f"{NAME} matches 3 groups, and what is stored fits none of them" in message
    for name in ("group_0", "group_1", "group_2"):
        assert f"quantization_config.config_groups.{name}" in message
        assert f"{name}: " in message.partition("found: ")[2]
    assert "what to do: check that config.json and weights belong together" in message


def test_the_one_group_that_matches_does_not_fit() -> None:
    """Its own complaint is told, with tensor, file, key and what to do."""
    with pytest.raises(LoadError) as raised:
        asked(resolver(), {**stored(), "weight_scale": torch.ones(64, 1)})
    assert f"{NAME}.weight_scale in w.safetensors is float32 [64, 1], expected float32 [128, 1]" in str(raised.value)
    assert "what to do: " in str(raised.value)
    with pytest.raises(UnsupportedSchemeError) as refused:
        asked(resolver(group(grouped(arguments(3)), None)), stored(grouped(arguments(3)), None))
    assert "where: config.json: quantization_config.config_groups.group_0\n" in str(refused.value)
    assert "quantise to 4 or 8 bits" in str(refused.value)


def test_what_is_wrong_with_many_modules_is_one_error() -> None:
    """And is found out once: experts are thousands of modules that are alike."""
    groups = resolver()
    errors = []
    for i in range(3):
        with pytest.raises(LoadError) as raised:
            groups.of(form({**stored(), "weight_scale": torch.ones(64, 1)}, f"model.layers.{i}.mlp.up_proj"))
        errors.append(raised.value)
    assert errors[0] is errors[1] is errors[2]


def test_what_fits_is_found_out_for_each_form() -> None:
    """Another shape, dtype or tensor is another question."""
    groups = resolver()
    assert groups.of(form(stored(), "a")).quant_type == "W8A8_DYNAMIC"
    for change in (
        {"weight_scale": torch.ones(64, 1)},
        {"weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)},
        {"input_scale": torch.ones(1)},
        {"strange": torch.ones(1)},
    ):
        with pytest.raises(LoadError):
            groups.of(form({**stored(), **change}, "b"))
    answer = groups.of(form({**stored(), "weight_scale": torch.ones(128, 1)}, "c"))
    assert (answer.form.module, answer.form.dtype("weight_scale", torch.int8)) == ("c", torch.float32)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_experts_by_the_name_that_writers_for_ascend_give_them() -> None:
    groups = resolver(group(), group(INT4, targets=["MoEGMM"]))
    assert asked(groups, stored(), EXPERT).quant_type == "W4A8_DYNAMIC"
    assert asked(groups, stored()).quant_type == "W8A8_DYNAMIC"
    assert asked(groups, stored(), "model.layers.0.mlp.shared_experts.up_proj").quant_type == "W8A8_DYNAMIC"
    alone = resolver(group(targets=["MoEGMM"]))
    assert asked(alone, stored(), EXPERT).quant_type == "W8A8_DYNAMIC"
    assert asked(alone, FLOAT).quant_type is None
    with pytest.raises(LayerResolutionError):
        asked(alone, stored())


def test_experts_are_linear_layers_too() -> None:
    assert asked(resolver(), stored(), EXPERT).quant_type == "W8A8_DYNAMIC"
    assert asked(resolver(ignore=["MoEGMM"]), FLOAT, EXPERT).reason == "ignored by 'MoEGMM'"


def test_a_head_is_a_linear_layer() -> None:
    groups = resolver(group(), group(INT4, targets=["lm_head"]))
    assert asked(groups, stored(), "lm_head", "lm_head").quant_type == "W4A8_DYNAMIC"
    assert asked(resolver(), stored(), "lm_head", "lm_head").quant_type == "W8A8_DYNAMIC"


def test_embeddings() -> None:
    """A quantised one may be what model_free_ptq calls Linear: every weight of two dimensions."""
    name = "model.embed_tokens"
    both = resolver(group(), group(INT8, None, ["Embedding"]))
    assert asked(both, stored(INT8, None), name, "Embedding").quant_type == "W8A16"
    assert asked(both, stored(), NAME).quant_type == "W8A8_DYNAMIC"
    assert asked(resolver(), FLOAT, name, "Embedding").reason == "no target matches"
    assert asked(resolver(group(INT8, None)), stored(INT8, None), name, "Embedding").quant_type == "W8A16"


def test_a_class_of_another_kind_is_not_matched() -> None:
    """Groups of attention have no weights, and name a class that no layer with weights has."""
    groups = resolver(group(), group(None, INT8_STATIC, ["Qwen3Attention"]))
    assert asked(groups, stored()).quant_type == "W8A8_DYNAMIC"
    assert groups.of(form(stored())).quant_type == "W8A8_DYNAMIC"


# --- planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "targets", "expected"),
    [([], ["Linear"], "W8A8_DYNAMIC"), ([NAME], ["Linear"], None), ([], ["re:.*attn"], None)],
)
def test_while_there_are_no_files_the_section_decides(
    ignore: list[str], targets: list[str], expected: str | None
) -> None:
    answer = asked(resolver(group(targets=targets), ignore=ignore))
    assert answer.quant_type == expected
    assert (answer.form.weight is not None) == (expected is not None)


def test_while_there_are_no_files_the_first_group_counts() -> None:
    assert asked(resolver(group(), group(grouped(INT4), None, [NAME]))).quant_type == "W4A16"
