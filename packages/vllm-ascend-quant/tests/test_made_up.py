"""`load_format="dummy"`: weights are made up, and real ones come later, with the numbers of a start that had them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quant_core import CheckpointError, get_scheme_class
from vllm_ascend_quant.methods.cache import CacheScales

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

W8A8, DYNAMIC = "msmodelslim/qwen3/W8A8", "msmodelslim/qwen2/W8A8_DYNAMIC"
GROUPS, FLATQUANT = "msmodelslim/qwen3/W8A16_GROUP64", "msmodelslim/qwen3/W4A4_FLATQUANT_DYNAMIC"
WEIGHTS = "quant_model_weights.safetensors"


def is_served(file: Path) -> bool:
    """Whether a description has types of linear layers and caches only."""
    types = {said for key, said in json.loads(file.read_text()).items() if "." in key and isinstance(said, str)}
    kinds = ("linear", "attention")
    return all(any(get_scheme_class(quant_type, kind) for kind in kinds) for quant_type in types - {"FLOAT"})


#: Every checkpoint of a dense model whose types are served.
DENSE = sorted(
    str(file.parent.relative_to(DATA / "checkpoints"))
    for file in DATA.glob("checkpoints/msmodelslim/qwen[23]/*/quant_model_description*.json")
    if is_served(file)
)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def without_weights(folder: Path) -> Path:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return folder


def of_its_own(folder: Path) -> Path:
    """Let the members of fused layers have what calibration finds for each by itself."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    factors = {
        "k_proj.input_scale": 1.5,
        "up_proj.input_scale": 0.5,
        "k_proj.clip_ratio": 0.75,
        "up_proj.clip_ratio": 0.5,
    }
    for name in tensors:
        tensors[name] = tensors[name] * factors.get(".".join(name.split(".")[-2:]), 1)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def outputs(model: Any) -> dict[str, Tensor]:
    """What each linear layer and embedding makes of the same input, and the scales of caches."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            x = torch.randn(5, layer.input_size, generator=torch.Generator().manual_seed(1))
            found[path] = layer(x.to(layer.params_dtype))[0]
        elif isinstance(layer, CacheScales):
            found[path] = torch.cat([param.flatten() for param in layer.parameters()])
        elif isinstance(layer, ParallelLMHead):
            found[path] = layer.quant_method.apply(layer, torch.ones(2, layer.embedding_dim))
        elif isinstance(layer, VocabParallelEmbedding):
            found[path] = layer(torch.arange(20))
    return found


@pytest.mark.parametrize("key", DENSE)
def test_each_layer_computes_what_it_does_after_a_real_start(
    key: str, load_model: Callable[..., Any], reload_model: Callable[..., None]
) -> None:
    """Bit by bit, for every type."""
    folder = DATA / "checkpoints" / key
    with load_model(folder) as model:
        fresh = outputs(model)
    with load_model(folder, load_format="dummy") as model:
        made_up = outputs(model)
        reload_model(model, tensors_of(folder))
        found = outputs(model)
    assert fresh.keys() == found.keys()
    assert [path for path in fresh if not torch.equal(fresh[path], found[path])] == []
    assert not any(torch.equal(fresh[path], made_up[path]) for path in fresh)


@pytest.mark.parametrize("key", [W8A8, FLATQUANT])
def test_members_that_do_not_share_a_scale(
    key: str,
    checkpoint: Callable[[str], Path],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """Made-up input scales and clip ratios are equal; the real ones need not be, and may change with each reload."""
    first, own = DATA / "checkpoints" / key, of_its_own(checkpoint(key))
    prompts = reference.prompts[:3]
    with start_engine(own) as llm:
        fresh = ask(llm, prompts)
    with start_engine(first) as llm:
        fresh_first = ask(llm, prompts)
    assert fresh_first != fresh
    with start_engine(own, load_format="dummy") as llm:
        for folder, expected in ((own, fresh), (first, fresh_first), (own, fresh)):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors_of(folder).items())})
            assert ask(llm, prompts) == expected


@pytest.mark.parametrize("key", [W8A8, DYNAMIC])
def test_without_any_file(
    key: str,
    checkpoint: Callable[[str], Path],
    start_engine: Callable[..., Any],
    ask: Callable[..., Any],
    reference: Any,
) -> None:
    """The description alone tells the model; it can be run, and takes real weights."""
    prompts = reference.prompts[:3]
    with start_engine(DATA / "checkpoints" / key) as llm:
        fresh = ask(llm, prompts)
    tensors = load_file(DATA / "checkpoints" / key / WEIGHTS)
    with start_engine(without_weights(checkpoint(key)), load_format="dummy") as llm:
        assert ask(llm, prompts) != fresh
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        assert ask(llm, prompts) == fresh


def test_a_description_that_does_not_tell_enough(
    checkpoint: Callable[[str], Path], configure: Callable[..., Any]
) -> None:
    folder = without_weights(checkpoint(GROUPS))
    with pytest.raises(CheckpointError, match="does not tell which scales are stored") as raised:
        configure(folder, load_format="dummy")
    assert "group_size 64" in str(raised.value)
    with pytest.raises(CheckpointError, match=r"the folder has no \*\.safetensors file"):
        configure(folder)
