"""`--load-format`: each way of vLLM's to get weights works with a quantised checkpoint, or is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.model_executor.model_loader import DefaultModelLoader, ShardedStateLoader, register_model_loader

from quant_core import CheckpointError, LimitError, LoadError
from vllm_ascend_quant import compat
from vllm_ascend_quant.files import loaders, saved_state
from vllm_ascend_quant.files.saved_folder import STORED

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

W8A8, DYNAMIC = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen2/W8A8_DYNAMIC"
GROUPS = "msmodelslim/qwen3/W8A16_GROUP64"
SHARDED = "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED"
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weights.safetensors"


def parameters(load_model: Callable[..., Any], folder: Path | str, **options: Any) -> dict[str, Tensor]:
    """All parameters of the loaded model, in their run-time form."""
    with load_model(folder, **options) as model:
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def saved(load_model: Callable[..., Any], folder: Path, target: Path, **options: Any) -> Path:
    """What `save_sharded_state` writes, after the model of a folder was loaded."""
    target.mkdir()
    with load_model(folder) as model:
        ShardedStateLoader.save_model(model, str(target), **options)
    return target


# --- the files of the checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_format", ["hf", "safetensors", "SafeTensors", "runai_streamer"])
@pytest.mark.parametrize("key", [W8A8, SHARDED])
def test_the_same_as_auto(load_format: str, key: str, load_model: Callable[..., Any]) -> None:
    """One file, and several with an index."""
    folder = DATA / "checkpoints" / key
    assert equal(parameters(load_model, folder, load_format=load_format), parameters(load_model, folder))


def test_a_load_format_of_a_third_party(load_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not known here, so let through; what it leaves out is noticed."""
    from vllm.model_executor import model_loader

    # registering writes here
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER))
    lost = "model.layers.1.mlp.up_proj.weight_scale"

    @register_model_loader("third-party")
    class Loader(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            self.load_config.load_format = "auto"

        def get_all_weights(self, *args: Any) -> Any:
            return (pair for pair in super().get_all_weights(*args) if pair[0] != lost)

    with pytest.raises(LoadError, match=f"never loaded: {lost}"):
        parameters(load_model, DATA / "checkpoints" / DYNAMIC, load_format="third-party")


@pytest.mark.parametrize("load_format", [*loaders._REFUSED, "no-such-format"])
def test_refused_by_name(load_format: str, configure: Callable[..., Any]) -> None:
    """In the front process, with the reason and what works."""
    with pytest.raises(LimitError, match=f"--load-format {load_format} does not work") as raised:
        configure(DATA / "checkpoints" / W8A8, load_format=load_format)
    assert loaders._REFUSED.get(load_format, "no load format of this name") in str(raised.value)
    assert "leave the argument out" in str(raised.value)


def test_every_load_format_is_decided() -> None:
    """A vLLM with one more is noticed here, and not by a user."""
    decided = {*loaders._CHECKPOINT, *loaders.SAVED, loaders.DUMMY, *loaders._REFUSED}
    assert set(compat.loader_names()) <= decided


def test_float_models_are_let_alone(configure: Callable[..., Any]) -> None:
    config = configure(DATA / "models" / "qwen3", load_format="npcache")
    assert config.quant_config is None


# --- saved states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [W8A8, SHARDED, GROUPS])
def test_a_saved_state(
    key: str, tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any], reference: Any
) -> None:
    """Saved by vLLM's own function, started from nothing else, and reloaded from a checkpoint's stream."""
    folder, target, prompts = DATA / "checkpoints" / key, tmp_path / "state", reference.prompts[:4]
    target.mkdir()
    with start_engine(folder) as llm:
        fresh = ask(llm, prompts)
        llm.llm_engine.engine_core.save_sharded_state(str(target), max_size=200_000)
        assert ask(llm, prompts) == fresh
    assert len(list(target.glob("model-rank-0-part-*.safetensors"))) > 1
    assert not list(target.glob("*.index.json"))
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with start_engine(target, load_format="sharded_state") as llm:
        assert ask(llm, prompts) == fresh
        swapped = {name: t.flip(0).contiguous() if t.dtype == torch.int8 else t for name, t in tensors.items()}
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(swapped.items())})
        assert ask(llm, prompts) != fresh
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        assert ask(llm, prompts) == fresh


def test_saved_once_more_and_streamed(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """A state of a state is the same; so is what another of vLLM's loaders reads."""
    folder = DATA / "checkpoints" / DYNAMIC
    first = saved(load_model, folder, tmp_path / "first")
    second = tmp_path / "second"
    second.mkdir()
    with load_model(first, load_format="sharded_state") as model:
        ShardedStateLoader.save_model(model, str(second))
    expected = parameters(load_model, folder)
    assert equal(parameters(load_model, second, load_format="sharded_state"), expected)
    assert equal(parameters(load_model, second, load_format="runai_streamer_sharded"), expected)


def test_saved_states_and_checkpoints_are_told_apart(
    tmp_path: Path, load_model: Callable[..., Any], configure: Callable[..., Any]
) -> None:
    folder = DATA / "checkpoints" / DYNAMIC
    with pytest.raises(CheckpointError, match="holds no saved state of a quantised model"):
        configure(folder, load_format="sharded_state")
    target = saved(load_model, folder, tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds a saved state, which --load-format auto cannot read"):
        configure(target)
    (target / DESCRIPTION).unlink()
    for options in ({}, {"load_format": "sharded_state"}):
        with pytest.raises(CheckpointError, match="no file that says how it is quantised"):
            configure(target, **options)


def test_a_saved_state_that_is_damaged(
    tmp_path: Path, load_model: Callable[..., Any], configure: Callable[..., Any]
) -> None:
    target = saved(load_model, DATA / "checkpoints" / DYNAMIC, tmp_path / "state")
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.self_attn.qkv_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:128].clone()}, file)  # a rank's part of a larger parallel size
    with pytest.raises(LoadError, match=f"the saved {name} does not fit") as raised:
        parameters(load_model, target, load_format="sharded_state")
    assert "found: float32 [128]" in str(raised.value)
    (target / STORED).write_text(json.dumps({"model.norm.weight": ["file", "no_dtype", [128]]}))
    with pytest.raises(CheckpointError, match=f"{STORED} is not what save_sharded_state writes"):
        configure(target, load_format="sharded_state")


def test_input_scales_of_their_own_do_not_survive(
    tmp_path: Path, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """What a scheme found out from values is not in its parameters: refused instead of computed wrongly."""
    folder = checkpoint(W8A8)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.self_attn.k_proj.input_scale"] *= 1.5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    target = saved(load_model, folder, tmp_path / "state")
    with pytest.raises(LoadError, match=r"saved .*qkv_proj\.input_(scale|offset) does not fit") as raised:
        parameters(load_model, target, load_format="sharded_state")
    assert "input scales of their own" in str(raised.value)


def test_the_stages_of_a_pipeline(
    tmp_path: Path, load_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older vLLM writes them over each other: refused there, left to vLLM where it keeps them apart."""

    class StandInGroup:
        """A stand-in for the group of two stages; what is saved is one of one."""

        world_size = 2

    with load_model(DATA / "checkpoints" / DYNAMIC) as model:
        monkeypatch.setattr(saved_state, "get_pp_group", StandInGroup)
        if compat.saves_pipelines():
            ShardedStateLoader.save_model(model, str(tmp_path))
        else:
            with pytest.raises(LimitError, match=r"cannot save the state of a pipeline.*\n.*pipeline_parallel_size 2"):
                ShardedStateLoader.save_model(model, str(tmp_path))
    assert bool(list(tmp_path.glob("*.safetensors"))) == compat.saves_pipelines()


def test_what_would_be_lost_is_not_saved(
    tmp_path: Path, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """vLLM packs float layers for the CPU and drops their weights; a scheme may hold tensors that are no parameters."""
    folder, module = checkpoint(DYNAMIC), "model.layers.1.self_attn.o_proj"
    tensors = load_file(folder / WEIGHTS)
    scale, _ = tensors.pop(f"{module}.weight_scale"), tensors.pop(f"{module}.weight_offset")
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"] * scale
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    types = json.loads((folder / DESCRIPTION).read_text())
    types = {key: "FLOAT" if key.startswith(module) else value for key, value in types.items()}
    types = {key: value for key, value in types.items() if not key.startswith(f"{module}.weight_")}
    (folder / DESCRIPTION).write_text(json.dumps(types))
    with load_model(folder) as model:
        packed = model.get_submodule(module).weight.numel() == 0
        if packed:
            with pytest.raises(LimitError, match=f"1 float layers hold no weights that could be saved: {module}"):
                ShardedStateLoader.save_model(model, str(tmp_path))
    assert packed  # else vLLM has changed, and saves float layers too
    with load_model(DATA / "checkpoints" / DYNAMIC) as model:
        model.get_submodule(module).handle = torch.zeros(1)
        with pytest.raises(LimitError, match=f"no parameters, and would not be saved: {module}.handle"):
            ShardedStateLoader.save_model(model, str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))
