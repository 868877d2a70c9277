"""Reloads from folders that do not fit: each is refused by name, and a good one afterwards recovers."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quant_core import LoadError, QuantError

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

KEY = "msmodelslim/qwen2/W8A8_DYNAMIC"
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weights.safetensors"
LAYER, SCALE = "model.layers.1", "model.layers.1.mlp.up_proj.weight_scale"


def without(folder: Path, prefix: str) -> Path:
    """Take tensors out of the files and out of the description, so that these two agree."""
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, folder / WEIGHTS)
    types = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({k: v for k, v in types.items() if not k.startswith(prefix)}))
    return folder


#: Makes a folder in the place of a copy of the engine's own; and what the error says of it.
BAD: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "another type": (
        lambda _: DATA / "checkpoints" / "msmodelslim" / "qwen2" / "W8A8",
        ["not of the form", f"{LAYER}.mlp.down_proj was W8A8_DYNAMIC and is W8A8"],
    ),
    "another architecture": (
        lambda _: DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8_DYNAMIC_SHARDED",
        ["could not load", "_norm"],
    ),
    "another format": (
        lambda _: DATA / "checkpoints" / "llmcompressor" / "qwen3" / "W8A8_DYNAMIC",
        ["no ModelSlim checkpoint", "compressed-tensors"],
    ),
    "a float model": (lambda _: DATA / "models" / "qwen2", ["no ModelSlim checkpoint"]),
    "one scale absent": (lambda copy: without(copy, SCALE), [f"{SCALE} is absent"]),
    "one layer absent": (lambda copy: without(copy, f"{LAYER}."), [f"{LAYER}.", "neither", "know this layer"]),
    "no folder": (lambda copy: copy / "nothing", ["neither a folder nor in this machine's Hugging Face cache"]),
}


def test_refused_and_recovered(
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """After each, the next reload is judged by itself: a stream, a folder, or what the engine began with."""
    first, prompts = DATA / "checkpoints" / KEY, reference.prompts[:2]
    tensors = load_file(first / WEIGHTS)
    good: list[dict[str, Any]] = [{"weights_iterator": tensors}, {"weights_path": str(first)}, {}]
    with start_engine(first) as llm:
        fresh = ask(llm, prompts)

        def reload(**source: Any) -> None:
            if "weights_iterator" in source:
                source = {"weights_iterator": iter(source["weights_iterator"].items())}
            llm.collective_rpc("reload_weights", kwargs=source)

        for number, (make, said) in enumerate(BAD.values()):
            bad = make(checkpoint(KEY).rename(tmp_path / str(number)))
            with pytest.raises(QuantError) as raised:
                reload(weights_path=str(bad))
            assert all(part in str(raised.value) for part in said), str(raised.value)
            reload(**good[number % len(good)])
            assert ask(llm, prompts) == fresh


def test_tensors_that_a_caller_sends(start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any) -> None:
    """Errors say what the caller did and suspect no file: called past vLLM's reload, other names, other shapes."""
    first, prompts = DATA / "checkpoints" / KEY, reference.prompts[:2]
    tensors = load_file(first / WEIGHTS)
    strange = {**tensors, "actor.model.norm.weight": tensors["model.norm.weight"]}
    long = {**tensors, "model.norm.weight": tensors["model.norm.weight"].repeat(2)}
    with start_engine(first) as llm:
        fresh = ask(llm, prompts)
        for part in (["model.norm.weight"], [f"{LAYER}.self_attn.o_proj.weight"], list(tensors)):
            with pytest.raises(LoadError, match=r"call llm\.collective_rpc.*reload_weights"):
                llm.apply_model(lambda model, part=part: model.load_weights([(n, tensors[n] * 2) for n in part]) and 0)
            assert ask(llm, prompts) == fresh
        for sent, said in (
            (strange, "has no tensor of this name"),
            (long, r"holds torch\.\w+ \[128\] under this name"),
        ):
            with pytest.raises(LoadError, match=rf"(?s)the tensors that were sent.*{said}") as raised:
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sent.items())})
            assert "config.json" not in str(raised.value)
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
            assert ask(llm, prompts) == fresh
