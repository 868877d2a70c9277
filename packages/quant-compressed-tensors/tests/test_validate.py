"""What is wrong or odd with a folder and can be said from names, shapes and dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_folders import (
    EXPERTS,
    HIDDEN,
    INT4,
    INT8,
    INT8_STATIC,
    SIZES,
    WIDE,
    Content,
    asymmetric,
    content,
    group,
    grouped,
    stored,
    with_experts,
)

from quant_compressed_tensors import CompressedTensorsFormat
from quant_core import (
    CheckpointError,
    CheckpointFolder,
    Finding,
    LayerQuery,
    LayerResolutionError,
    LoadError,
    QuantError,
    UnsupportedSchemeError,
)

PLACE = "quantization_config"
Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"


def refused(found: Content, folder: Path, kind: type[QuantError], *said: str) -> str:
    """The message with which a folder of this content is refused; each of `said` is in it."""
    with pytest.raises(QuantError) as raised:
        CompressedTensorsFormat.load(CheckpointFolder(found.write(folder)))
    message = str(raised.value)
    assert type(raised.value) is kind, message
    for text in (*said, "what to do: "):
        assert text in message, message
    return message


def served(found: Content, folder: Path) -> CompressedTensorsFormat:
    return CompressedTensorsFormat.load(CheckpointFolder(found.write(folder)))


# --- scales of caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(f"{ATTENTION}.{part}_scale" for part in "qkv"),
        f"{ATTENTION}.kv_scale",
        f"{ATTENTION}.k_zero_point",
        f"{ATTENTION}.k_proj.k_scale",
        f"{ATTENTION}.k_proj.output_scale",
        f"{ATTENTION}.v_proj.output_scale",
    ],
)
@pytest.mark.parametrize("scheme", [None, {}, "null"])
def test_scales_of_a_cache_that_nobody_mentions(name: str, scheme: Any, tmp_path: Path) -> None:
    """Under every name that a writer had, beside quantised projections and beside float ones."""
    for quantised in (True, False):
        found = content(kv_cache_scheme=scheme)
        if not quantised:
            for module in ("q_proj", "k_proj", "v_proj"):
                found.put_float(f"{ATTENTION}.{module}")
        found.tensors[name] = torch.ones(1)
        refused(found, tmp_path / str(quantised), CheckpointError, name, f"{PLACE}\n", "no kv_cache_scheme")


# --- what words hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "kept"), [(4, 8), (8, 4)])
def test_bits_that_the_words_do_not_hold(said: int, kept: int, tmp_path: Path) -> None:
    found = content(group({**INT8, "num_bits": kept}, None))
    found.group()["weights"]["num_bits"] = said
    features = WIDE * kept // said
    message = refused(
        found,
        tmp_path,
        LoadError,
        f"{DOWN} holds another number of weights than it says",
        f"where: config.json: {PLACE}.config_groups.group_0\n",
        f"{DOWN}.weight_packed in model.safetensors is {[HIDDEN, WIDE * kept // 32]}",
        f"which is {[HIDDEN, features]} of {said} bits; {DOWN}.weight_shape is {[HIDDEN, WIDE]}",
    )
    assert message.count("holds another number") == len(set(SIZES.values()))  # one of each kind tells


def test_bits_that_the_words_of_one_layer_do_not_hold(tmp_path: Path) -> None:
    """Words of another shape are another kind, and looked at too."""
    found = content(group(INT8, None))
    found.put(UP, stored(INT4, None, (WIDE, HIDDEN), packed=True))
    refused(found, tmp_path, LoadError, f"{UP} holds another number of weights than it says")


@pytest.mark.parametrize(
    "shape",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(2),
        torch.tensor([HIDDEN, HIDDEN + 1]),
        torch.tensor([HIDDEN // 2, HIDDEN * 2]),
    ],
)
def test_a_shape_that_is_none(shape: torch.Tensor, tmp_path: Path) -> None:
    found = content(group(INT4, None), layers=1)
    for module in {name.rpartition(".")[0] for name in found.tensors if name.endswith("weight_shape")}:
        found.tensors[f"{module}.weight_shape"] = shape.clone()
    refused(found, tmp_path, LoadError, "holds another number of weights than it says", ".weight_shape")


def test_shapes_without_weights(tmp_path: Path) -> None:
    """Nothing else is left of these modules, so that they could pass for ones that are only planned."""
    found = content(group(grouped(INT4), None))
    for module in (UP, DOWN):
        found.put(module, {"weight_shape": torch.tensor([1, 1])})
    refused(found, tmp_path, LoadError, "weight_shape of 2 modules", f"{UP}.weight_shape", f"{DOWN}.weight_shape")


def test_words_that_do_not_come_out_even(tmp_path: Path) -> None:
    """A writer fills the last word of a row; no operator takes such rows."""
    found = content(group(INT4, None))
    found.put(UP, stored(INT4, None, (WIDE, 100)))
    refused(
        found, tmp_path, LoadError, f"{UP} holds another number of weights than it says", "[256, 104]", "[256, 100]"
    )


# --- the tensors of a module ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "inputs", "suffix"),
    [
        (INT8, None, "weight_packed"),
        (INT8, None, "weight_scale"),
        (asymmetric(grouped(INT4)), None, "weight_zero_point"),
        (INT8, INT8_STATIC, "input_scale"),
        (INT8, asymmetric(INT8_STATIC), "input_zero_point"),
        (INT8, INT8_STATIC, "weight"),
    ],
)
def test_a_tensor_that_is_missing(weights: Any, inputs: Any, suffix: str, tmp_path: Path) -> None:
    found = content(group(weights, inputs))
    del found.tensors[f"{UP}.{suffix}"]
    if suffix in ("weight", "weight_packed"):
        refused(found, tmp_path, LoadError, UP, f"{UP}.weight_scale")
    else:
        refused(found, tmp_path, LoadError, f"{UP}.{suffix} is absent")


@pytest.mark.parametrize(
    ("suffix", "value", "said"),
    [
        ("weight_scale", torch.ones(WIDE), "is float32 [256], expected float32 [256, 1]"),
        ("weight_scale", torch.ones(WIDE, 2), "is float32 [256, 2], expected float32 [256, 1]"),
        ("weight_scale", torch.ones(WIDE, 1, dtype=torch.int32), "is int32 [256, 1], expected"),
        ("weight", torch.zeros(WIDE, HIDDEN, dtype=torch.uint8), "is uint8 [256, 128], expected int8"),
        ("weight", torch.zeros(WIDE, HIDDEN, dtype=torch.float8_e4m3fn), "is float8_e4m3fn [256, 128], expected int8"),
        ("weight", torch.zeros(WIDE, HIDDEN, dtype=torch.int64), "is int64 [256, 128], expected int8"),
        ("weight_g_idx", torch.zeros(HIDDEN, dtype=torch.int32), "weight_g_idx"),
        ("other", torch.zeros(1), "is not used by this type, and dropping it would change the results"),
        ("bias", torch.zeros(WIDE, dtype=torch.int8), "is int8 [256], expected [256] of a float dtype"),
        ("bias", torch.zeros(3), "is float32 [3], expected [256] of a float dtype"),
    ],
)
def test_a_tensor_of_another_form(suffix: str, value: torch.Tensor, said: str, tmp_path: Path) -> None:
    found = content()
    found.tensors[f"{UP}.{suffix}"] = value
    kind = UnsupportedSchemeError if suffix == "weight_g_idx" else LoadError
    refused(found, tmp_path, kind, UP, said)


def test_a_rotation_that_lies_beside_a_weight(tmp_path: Path) -> None:
    """Of which the section says nothing."""
    found = content()
    found.tensors[f"{DOWN}.R4_input.weight"] = torch.eye(32, dtype=torch.float64)
    read = served(found, tmp_path)  # a module of its own, that no layer of a model asks for: the engine refuses it
    assert read.layer_quant(LayerQuery(f"{DOWN}.R4_input")).quant_type is None
    found.tensors[f"{DOWN}.R4_input"] = torch.eye(32, dtype=torch.float64)
    refused(found, tmp_path / "beside", LoadError, f"{DOWN}.R4_input in model.safetensors is not used by this type")


@pytest.mark.parametrize(("size", "fits"), [(48, "32 or 64"), (24, "16 or 32")])
def test_groups_that_do_not_divide_the_input(size: int, fits: str, tmp_path: Path) -> None:
    """The message says which would."""
    message = refused(content(group(grouped(INT4, size), None)), tmp_path, UnsupportedSchemeError, "equal groups", DOWN)
    assert f"groups of {fits}" in message
    assert f"where: config.json: {PLACE}.config_groups.group_0" in message


def test_modules_that_fail_alike_are_reported_together(tmp_path: Path) -> None:
    found = with_experts(content())
    for expert in range(EXPERTS):
        del found.tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale"]
    message = refused(found, tmp_path, LoadError, "model.layers.1.mlp.experts.0.up_proj.weight_scale is absent")
    assert message.count("is absent") == 1
    assert "also: model.layers.1.mlp.experts.1.up_proj, model.layers.1.mlp.experts.2.up_proj" in message


def test_every_error_at_once(tmp_path: Path) -> None:
    found = content(ignore=["lm_head", Q])
    del found.tensors[f"{UP}.weight_scale"]
    found.section["sparsity_config"] = {"format": "marlin-24"}
    refused(
        found, tmp_path, UnsupportedSchemeError, "sparsity_config", f"{Q} is stored quantised", f"{UP}.weight_scale"
    )


def test_a_quantised_module_without_a_group_in_a_folder_of_many(tmp_path: Path) -> None:
    """It is found while the folder is read, though no layer of a model may ask for it."""
    found = content()
    found.group()["targets"] = ["re:.*mlp", "re:.*[qkv]_proj"]
    refused(found, tmp_path, LayerResolutionError, f"{ATTENTION}.o_proj is stored quantised, but it matches no target")


# --- oddities ---------------------------------------------------------------------------------------------------------


def odd(found: Content, folder: Path, *layers: str) -> list[Finding]:
    """What is odd once these layers of a model are decided."""
    read = served(found, folder)
    return list(read.review({name: read.layer_quant(LayerQuery(name)) for name in layers}))


@pytest.mark.parametrize(
    ("entry", "warned"),
    [
        ("model.layers.7.mlp.gate", True),
        ("re:.*gate$", True),
        ("Conv2d", True),
        ("re:model.layers.0.mlp.gat", False),
        ("lm_head", False),
        ("model.embed_tokens", False),
        ("re:.*embed", False),
        ("Linear", False),
        ("Embedding", False),
    ],
)
@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_entries_that_name_nothing(entry: str, warned: bool, place: str, tmp_path: Path) -> None:
    """Of `ignore` without float modules that it would contradict; a typing error must not go unnoticed."""
    found = content(ignore=[])
    if place == "targets":
        found.section["config_groups"]["group_1"] = group(targets=[entry])
    elif entry != "Linear":  # which would ignore what is quantised, as soon as an engine asks
        found.section["ignore"] = [entry]
        if entry.endswith("gat"):
            found.put_float("model.layers.0.mlp.gate_proj")
    warnings = [finding for finding in odd(found, tmp_path) if finding.severity == "warning"]
    assert bool(warnings) == warned
    if warned:
        key = "ignore" if place == "ignore" else "config_groups.group_1.targets"
        assert f"{entry!r} names no module of this checkpoint" in warnings[0].what
        assert warnings[0].where == f"config.json: {PLACE}.{key}"
        assert warnings[0].todo


def test_an_entry_in_two_places_is_one_warning(tmp_path: Path) -> None:
    found = content(group(targets=["Linear", "nowhere"]), ignore=["nowhere"])
    (finding,) = odd(found, tmp_path)
    assert finding.where == f"config.json: {PLACE}.config_groups.group_0.targets, {PLACE}.ignore"


def test_a_tied_head_has_no_module(tmp_path: Path) -> None:
    found = content()
    found.drop("lm_head")
    assert [finding.severity for finding in odd(found, tmp_path / "untied")] == ["warning"]
    found.config["tie_word_embeddings"] = True
    assert odd(found, tmp_path / "tied") == []


def test_experts_are_named_by_their_class(tmp_path: Path) -> None:
    groups = group(), group(INT4, targets=["MoEGMM"])
    assert odd(with_experts(content(*groups)), tmp_path / "experts") == []
    (finding,) = odd(content(*groups), tmp_path / "none")
    assert "'MoEGMM' names no module" in finding.what


def test_float_modules_that_a_target_matches_are_counted(tmp_path: Path) -> None:
    """One line for each group, with the count."""
    found = content(group(), group(targets=["re:.*attn"]))
    floats = [
        f"model.layers.{layer}.{name}" for layer in range(2) for name in SIZES if "q_proj" in name or "up" in name
    ]
    for module in floats:
        found.put_float(module)
    layers = [name for name in floats if "1.self" not in name]
    counted = [f for f in odd(found, tmp_path, *layers, DOWN, "lm_head") if f.severity == "info"]
    assert [(f.what, f.where) for f in counted] == [
        (
            "2 modules that 'Linear' matches are stored in float, and are served in float",
            f"config.json: {PLACE}.config_groups.group_0",
        ),
        (
            "1 modules that 're:.*attn' matches are stored in float, and are served in float",
            f"config.json: {PLACE}.config_groups.group_1",
        ),
    ]


def test_modules_that_are_ignored_are_not_counted(tmp_path: Path) -> None:
    found = content(ignore=["lm_head", UP])
    found.put_float(UP)
    assert odd(found, tmp_path, UP, "lm_head") == []
