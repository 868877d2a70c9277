"""Quantised caches that must not be served: refused by an error that names the checkpoint's tensor and what to do."""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import QuantError

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

C8, LINEAR = "msmodelslim/qwen3/W8A8C8_ASYM", "msmodelslim/qwen3/W8A8"
DESCRIPTION = "quant_model_description.json"
ATTENTION = "model.layers.1.self_attn"
K_SCALE, K_OFFSET = f"{ATTENTION}.k_proj.kv_cache_scale", f"{ATTENTION}.k_proj.kv_cache_offset"
V_SCALE = f"{ATTENTION}.v_proj.kv_cache_scale"

Tensors = dict[str, Tensor]
Content = dict[str, Any]
Change = Callable[[Tensors, Content], object]


def drop(*names: str) -> Change:
    """Tensors alone: what is said of them stays."""
    return lambda tensors, _: [tensors.pop(name) for name in names]


def forget(*names: str) -> Change:
    """Tensors, and what the description says of them."""
    return lambda tensors, said: [(tensors.pop(name), said.pop(name)) for name in names]


def put(name: str, value: float, place: int = 5) -> Change:
    """Another value of a stored tensor; the only one where there is only one."""
    return lambda tensors, _: tensors[name].view(-1)[min(place, tensors[name].numel() - 1)].fill_(value)


def size(name: str, count: int) -> Change:
    return lambda tensors, _: tensors.update({name: torch.ones(count)})


def say(**values: Any) -> Change:
    return lambda _, said: said.update(values)


def describe(name: str, quant_type: str) -> Change:
    return lambda _, said: said.update({name: quant_type})


def changed(folder: Path, change: Change, file: str, section: str | None = None) -> Path:
    (weights,) = folder.glob("*.safetensors")
    tensors, content = load_file(weights), json.loads((folder / file).read_text())
    change(tensors, content if section is None else content[section])
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / file).write_text(json.dumps(content))
    return folder


def refused(load_model: Callable[..., Any], folder: Path, said: list[str]) -> None:
    with pytest.raises(QuantError) as raised, load_model(folder):
        pass
    message = str(raised.value)
    assert all(text in message for text in [*said, "what to do: "]), message


# --- msModelSlim ------------------------------------------------------------------------------------------------------

ALL = [
    f"model.layers.{layer}.self_attn.{part}_proj.kv_cache_{kind}"
    for layer in range(3)
    for part in "kv"
    for kind in ("scale", "offset")
]
OF_ONE = [name for name in ALL if name.startswith(ATTENTION)]

MODELSLIM: dict[str, tuple[str, Change, list[str]]] = {
    "one scale absent": (C8, drop(K_SCALE), [K_SCALE]),
    "one layer's tensors absent": (C8, drop(*OF_ONE), OF_ONE),
    "only values": (C8, forget(K_SCALE, K_OFFSET), [V_SCALE, f"{ATTENTION}.k_proj.kv_cache_scale"]),
    "only keys": (C8, forget(*[n for n in OF_ONE if ".v_" in n]), [K_SCALE, f"{ATTENTION}.v_proj.kv_cache_scale"]),
    "one offset absent": (C8, forget(K_OFFSET), [K_OFFSET]),
    "too few scales": (C8, size(V_SCALE, 32), [f"{V_SCALE} in", "[32]", "expected: 64 values, per channel"]),
    "too many scales": (C8, size(V_SCALE, 128), [f"{V_SCALE} in", "[128]", "expected: 64 values"]),
    "one scale for all": (C8, size(K_SCALE, 1), [f"{K_SCALE} in", "[1]", "expected: 64 values"]),
    "too many offsets": (C8, size(K_OFFSET, 65), [f"{K_OFFSET} in", "[65]", "expected: 64 values"]),
    "a scale of zero": (C8, put(K_SCALE, 0.0), [K_SCALE]),
    "a negative scale": (C8, put(V_SCALE, -0.5), [V_SCALE]),
    "a scale that is no number": (C8, put(V_SCALE, math.nan), [V_SCALE]),
    "an infinite scale": (C8, put(V_SCALE, math.inf), [V_SCALE]),
    "an offset that is no number": (C8, put(K_OFFSET, math.nan), [K_OFFSET]),
    "claimed, and no scales": (LINEAR, say(kv_cache_type="C8"), ["kv_cache_type", "'C8'", "k_proj.kv_cache_scale"]),
    "claimed by the other key": (LINEAR, say(kv_quant_type="C8"), ["'C8'", "k_proj.kv_cache_scale"]),
    "described, and not in the files": (LINEAR, describe(K_SCALE, "C8"), [K_SCALE, "no file holds it"]),
    "in the files, and not described": (C8, lambda _, said: [said.pop(n) for n in OF_ONE], [K_SCALE, DESCRIPTION]),
    "an unknown type": (C8, lambda _, d: d.update(dict.fromkeys(OF_ONE, "C9")), [K_SCALE, "'C9'"]),
    "a type of linear layers": (C8, lambda _, d: d.update(dict.fromkeys(OF_ONE, "W8A8")), [K_SCALE, "W8A8"]),
    "two types for one cache": (C8, describe(V_SCALE, "KV_FP8"), [K_SCALE, V_SCALE, "KV_FP8"]),
}


@pytest.mark.parametrize("case", MODELSLIM)
def test_of_msmodelslim(case: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]) -> None:
    key, change, said = MODELSLIM[case]
    refused(load_model, changed(checkpoint(key), change, DESCRIPTION), said)


@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_a_cache_without_offsets(
    value: float, checkpoint: Callable[[str], Path], start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """Absent offsets are offsets of zero: the same answers; and others with any other."""
    answers = []
    for absent in (True, False):

        def change(tensors: Tensors, said: Content, absent: bool = absent) -> None:
            for name in ALL:
                if name.endswith("offset"):
                    tensors[name].fill_(value * 1e4)
                    if absent:
                        tensors.pop(name), said.pop(name)

        folder = changed(checkpoint(C8), change, DESCRIPTION)
        folder = folder.rename(folder.with_name(f"{value}-{absent}"))
        with start_engine(folder) as llm:
            answers.append(ask(llm, [[1, *range(20, 60)]]))
    assert (answers[0] == answers[1]) == (value == 0)


# --- llm-compressor ---------------------------------------------------------------------------------------------------

CT_SCALE, CT_VALUE = f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"
SCHEME = "quantization_config.kv_cache_scheme"


def scheme(**values: Any) -> Change:
    return lambda _, section: section["kv_cache_scheme"].update(values)


def unsaid(_: Tensors, section: Content) -> None:
    section["kv_cache_scheme"] = None


def with_zero_points(value: int) -> Change:
    return lambda tensors, _: tensors.update({f"{ATTENTION}.k_zero_point": torch.tensor([value], dtype=torch.int8)})


COMPRESSED: dict[str, tuple[Change, list[str]]] = {
    "one scale absent": (drop(CT_SCALE), [CT_SCALE, SCHEME]),
    "one layer's scales absent": (drop(CT_SCALE, CT_VALUE), [CT_SCALE, CT_VALUE, SCHEME]),
    "no scales": (drop(*[f"model.layers.{i}.self_attn.{part}_scale" for i in range(3) for part in "kv"]), [SCHEME]),
    "several scales for one tensor": (size(CT_SCALE, 2), [f"{CT_SCALE} in", "[2]", "expected: 1 values"]),
    "a scale of zero": (put(CT_SCALE, 0.0), [CT_SCALE]),
    "a scale that is no number": (put(CT_VALUE, math.nan), [CT_VALUE]),
    "scales that nobody mentions": (unsaid, ["k_scale", "no kv_cache_scheme"]),
    "scales at run time": (scheme(dynamic=True), [SCHEME, "run time"]),
    "4 bits": (scheme(num_bits=4), [SCHEME, "float4"]),
    "4 bit integers": (scheme(num_bits=4, type="int"), [SCHEME, "int4"]),
    "scales per token": (scheme(strategy="token"), [SCHEME]),
    "scales per group": (scheme(strategy="group", group_size=16), [SCHEME, "group"]),
    "heads, and one scale": (scheme(strategy="attn_head"), [CT_SCALE.replace(".1.", ".0."), "per head"]),
    "no such arguments": (scheme(num_bits=99, type="of stone"), [SCHEME]),
    "zero points that are not zero": (with_zero_points(3), [f"{ATTENTION}.k_zero_point"]),
    "zero points that are absent": (scheme(symmetric=False, type="int"), [f"{ATTENTION}.k_zero_point", SCHEME]),
}


def assembled(target: Path) -> Path:
    spec = importlib.util.spec_from_file_location("assemble", DATA / "checkpoints" / "llmcompressor" / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.assemble("qwen3/KV_FP8_CT010", target)
    for path in (folder, *folder.iterdir()):  # the shared material may be read-only
        path.chmod(0o755)
    return folder


def in_one_file(folder: Path) -> Path:
    """Variants have their own tensors in a second file."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", COMPRESSED)
def test_of_llm_compressor(case: str, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    change, said = COMPRESSED[case]
    folder = in_one_file(assembled(tmp_path / "model"))
    refused(load_model, changed(folder, change, "config.json", "quantization_config"), said)


@pytest.mark.parametrize("value", [0])
def test_zero_points_that_are_zero_are_served(value: int, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Some writers store them for symmetric schemes."""
    folder = in_one_file(assembled(tmp_path / "model"))
    with load_model(changed(folder, with_zero_points(value), "config.json", "quantization_config")) as model:
        names = {name for name, _ in model.named_parameters() if ATTENTION.removeprefix("model.") in name}
    assert any(name.endswith("quantised_cache.k_scale") for name in names)
    assert not any(name.endswith("k_offset") for name in names)
