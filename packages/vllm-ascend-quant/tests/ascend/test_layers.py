"""vllm-ascend's own layers get our methods, and through their loaders the right tensors of a real checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import platform_model
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from quant_core.devices import planned_device
from vllm_ascend_quant import AscendFusedMoEMethod, AscendLinearMethod
from vllm_ascend_quant.served_model import served_model

#: Checkpoints whose layers show their weight exactly when they multiply unit vectors.
SHOWN = {
    "msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED": 12,
    "llmcompressor/qwen3/W8A8_DYNAMIC": 12,
    "msmodelslim/qwen2/W8A8_DYNAMIC": 12,
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight [out, in] of each quantised linear layer of a rank, as its products show it."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, AscendLinearMethod):
            inputs = getattr(layer, "input_size_per_partition", layer.input_size)
            found[name] = layer.quant_method.apply(layer, torch.eye(inputs).bfloat16()).t().float()
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def expected(layer: Any, modules: tuple[str, ...], tensors: dict[str, Tensor], rank: int, ranks: int) -> Tensor:
    """The part of a rank of a layer's weight, from the files."""
    members = [tensors[f"{m}.weight"].float() * tensors[f"{m}.weight_scale"].float() for m in modules]
    if isinstance(layer, RowParallelLinear):
        return torch.cat([member.chunk(ranks, 1)[rank] for member in members])
    return torch.cat([member.chunk(ranks, 0)[rank] for member in members])


@pytest.mark.parametrize("name", SHOWN)
def test_layers_of_vllm_ascend_hold_what_the_files_say(name: str, checkpoints: Path) -> None:
    config = platform_model.on_cpu(platform_model.front(checkpoints / name))
    with planned_device("910B"), platform_model.loaded(config) as model:
        served, tensors = served_model(model), stored(checkpoints / name)
        assert served is not None
        found = weights(model)
        assert len(found) == SHOWN[name]
        for path, weight in found.items():
            layer = model.get_submodule(path)
            assert type(layer).__module__.startswith("vllm_ascend.ops.")
            wanted = expected(layer, served.layers[path].modules, tensors, 0, 1)
            torch.testing.assert_close(weight, wanted, rtol=0.01, atol=1e-6)  # two roundings to bfloat16


def test_every_kind_of_layer_gets_the_platforms_or_our_method(checkpoints: Path) -> None:
    config = platform_model.on_cpu(platform_model.front(checkpoints / "msmodelslim/qwen3-moe/W8A8_DYNAMIC"))
    with planned_device("910B"), platform_model.loaded(config) as model:
        methods = {
            f"{type(layer).__name__}: {type(layer.quant_method).__name__}"
            for layer in model.modules()
            if hasattr(layer, "quant_method")
        }
        experts = next(layer for layer in model.modules() if type(layer).__name__ == "AscendFusedMoE")
        assert isinstance(experts.quant_method, AscendFusedMoEMethod)
    assert methods == {
        "AscendVocabParallelEmbedding: UnquantizedEmbeddingMethod",
        "AscendParallelLMHead: UnquantizedEmbeddingMethod",
        "AscendQKVParallelLinear: AscendLinearMethod",
        "AscendRowParallelLinear: AscendLinearMethod",
        "AscendReplicatedLinear: AscendUnquantizedLinearMethod",
        "AscendFusedMoE: AscendDispatchedFusedMoEMethod",
    }


def test_float_experts_get_the_platforms_method(checkpoints: Path) -> None:
    config = platform_model.on_cpu(platform_model.front(checkpoints / "msmodelslim/qwen3-moe/W8A8_DYNAMIC"))
    with platform_model.loaded(config) as model:
        experts = next(layer for layer in model.modules() if type(layer).__name__ == "AscendFusedMoE")
        table = torch.zeros(4, 2, dtype=torch.int32)
        method = config.quant_config.get_quant_method(experts, "no.module.of.this.name", tid2eid=table)
    assert type(method).__name__ == "AscendUnquantizedFusedMoEMethod"
    assert method.tid2eid is table


RANK = """
import sys
from pathlib import Path
import torch
import platform_model, test_layers
from quant_core.devices import planned_device
from vllm_ascend_quant.served_model import served_model
folder, rank, meeting, out = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
config = platform_model.on_cpu(platform_model.front(folder, tensor_parallel_size=2))
config.parallel_config.rank = rank
with planned_device("910B"), platform_model.loaded(config, rank, 2, meeting) as model:
    tensors, layers = test_layers.stored(folder), served_model(model).layers
    found = {
        path: (weight, test_layers.expected(model.get_submodule(path), layers[path].modules, tensors, rank, 2))
        for path, weight in test_layers.weights(model).items()
        if f"{layers[path].modules[0]}.weight_scale" in tensors  # static layers show other numbers
    }
    experts = [layer for layer in model.modules() if type(layer).__name__ == "AscendFusedMoE"]
    sums = [platform_model.experts(config, layer, *platform_model.tokens(layer, "any")) for layer in experts]
    torch.save((found, sums), out)
"""


def ranks(folder: Path, tmp_path: Path, run: Any = None) -> list[Any]:
    """What each of two ranks found."""
    files = [tmp_path / f"{folder.name}{rank}" for rank in range(2)]
    meeting = str(tmp_path / f"{folder.name}-meeting")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), meeting, str(file)],
            env=platform_model.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    for process in started:
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", ["msmodelslim/qwen3/W8A8_DYNAMIC_SHARDED", "llmcompressor/qwen3/W8A8_DYNAMIC"])
def test_each_rank_of_two_holds_its_part(name: str, checkpoints: Path, tmp_path: Path) -> None:
    for found, _ in ranks(checkpoints / name, tmp_path):
        assert len(found) == SHOWN[name]
        for weight, wanted in found.values():
            torch.testing.assert_close(weight, wanted, rtol=0.01, atol=1e-6)


def test_experts_cut_over_two_ranks_add_up(checkpoints: Path, tmp_path: Path) -> None:
    folder = checkpoints / "msmodelslim/qwen3-moe/W8A8_DYNAMIC"
    config = platform_model.on_cpu(platform_model.front(folder))
    with planned_device("910B"), platform_model.loaded(config) as model:
        experts = [layer for layer in model.modules() if type(layer).__name__ == "AscendFusedMoE"]
        whole = [platform_model.experts(config, layer, *platform_model.tokens(layer, "any")) for layer in experts]
    parts = zip(*(sums for _, sums in ranks(folder, tmp_path)), strict=True)
    for expected_sum, pair in zip(whole, parts, strict=True):
        found = sum(part.float() for part in pair)
        error = (found - expected_sum.float()).norm() / expected_sum.float().norm()
        assert error < 0.02  # each rank quantises its part of the hidden state by itself
