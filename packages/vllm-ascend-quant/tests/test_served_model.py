"""What is known about a built model belongs to it: models of one process share no decisions."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vllm_ascend_quant
from vllm_ascend_quant import AscendLinearMethod, AscendQuantizationConfig
from vllm_ascend_quant.served_model import served_model

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
CHECKPOINTS = DATA / "checkpoints" / "msmodelslim" / "qwen3"

WITHOUT_VLLM = """
import sys
import vllm_ascend_quant
hidden = set(vllm_ascend_quant.__all__) - set(dir(vllm_ascend_quant))
print("answer", sorted(hidden), "vllm" in sys.modules, "torch" in sys.modules)
from vllm_ascend_quant import AscendLinearMethod
print("answer", "vllm" in sys.modules, AscendLinearMethod.__module__)
"""


def another(configure: Callable[..., Any], folder: Path) -> tuple[Any, nn.Module]:
    """The config and model of a folder, built where the process has a model already."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = configure(folder)
    with set_current_vllm_config(config):
        return config, get_model(vllm_config=config)


def types_of(model: nn.Module) -> set[str | None]:
    """The types of the layers that our schemes serve, by their methods."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    return {method.quant.quant_type for method in methods if isinstance(method, AscendLinearMethod)}


def logits(model: Any) -> torch.Tensor:
    """What the last layer's projections give, which needs no engine."""
    layer = model.model.layers[2]
    hidden = torch.linspace(-1, 1, 256).view(2, 128)
    return torch.cat([layer.self_attn.qkv_proj(hidden)[0], layer.mlp(hidden)], 1)


def test_models_that_live_side_by_side(load_model: Callable[..., Any], configure: Callable[..., Any]) -> None:
    """One of ours, one in float, another of ours in another type: none changes what is known about the first."""
    with load_model(CHECKPOINTS / "W8A8") as first:
        owner = served_model(first)
        assert owner is not None
        decided, numbers = dict(owner.layers), logits(first)
        float_config, plain = another(configure, DATA / "models" / "qwen3")
        other_config, other = another(configure, CHECKPOINTS / "W8A16_GROUP64")

        assert (types_of(first), types_of(plain), types_of(other)) == ({"W8A8"}, set(), {"W8A16"})
        assert float_config.quant_config is None
        assert served_model(plain) is None
        assert served_model(first) is owner
        assert owner.layers == decided
        assert torch.equal(logits(first), numbers)
        others = served_model(other)
        assert others is not None
        assert others is not owner
        assert other_config.quant_config.layers == others.layers
        assert {quant.quant_type for quant in others.layers.values()} == {"W8A16", None}


def test_an_owner_lives_as_long_as_its_model(load_model: Callable[..., Any], configure: Callable[..., Any]) -> None:
    with load_model(CHECKPOINTS / "W8A8"):
        config, model = another(configure, CHECKPOINTS / "W8A8")
        owner = served_model(model)
        gone = weakref.ref(owner)
        assert config.quant_config.layers
        del model, owner
        gc.collect()
        assert gone() is None
        assert not config.quant_config.layers


def test_a_config_is_plain_data(load_model: Callable[..., Any], configure: Callable[..., Any]) -> None:
    """A copy, as vLLM makes for its workers, has what was read and no decision."""
    with load_model(CHECKPOINTS / "W8A8"):
        config, _ = another(configure, CHECKPOINTS / "W8A8")
        pickled = pickle.dumps(config.quant_config)
        assert b"LayerQuant" not in pickled
        for made in (copy.deepcopy(config.quant_config), pickle.loads(pickled)):
            assert isinstance(made, AscendQuantizationConfig)
            assert made.format is not None
            assert made.format.folder.path == CHECKPOINTS / "W8A8"
            assert not made.layers


def test_the_public_names_import_vllm_only_when_they_are_used() -> None:
    printed = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True, check=True).stdout
    answers = [line for line in printed.splitlines() if line.startswith("answer ")]  # beside what vLLM logs
    assert answers == ["answer [] False False", "answer True vllm_ascend_quant.methods.linear"]
    for name in vllm_ascend_quant.__all__:
        assert getattr(vllm_ascend_quant, name) is not None
    assert not hasattr(vllm_ascend_quant, "AscendNothing")
