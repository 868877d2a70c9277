"""Float parts beside quantised layers: as strict as vLLM with the original model, and nobody serves what nobody wrote.

What a quantiser adds is used or refused (test_bad_input.py).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LoadError
from quant_modelslim.writer import write_checkpoint
from vllm_ascend_quant.plugin import serving

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
from survey_kinds import causal
from survey_table import TABLE

OPTIONS = {"max_model_len": 128, "skip_tokenizer_init": True}


@pytest.fixture(autouse=True)
def inspect_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at each model class in a new process first, ten seconds each, lest CUDA be initialised."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


def made(architecture: architectures.Architecture, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with float parts, and its tensors."""
    architectures.make(architecture, folder)
    (file,) = (folder / "quant").glob("*.safetensors")
    return folder / "quant", load_file(file)


def put(folder: Path, tensors: dict[str, Tensor]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})


# --- what vLLM does with the original model ---------------------------------------------------------------------------


def test_a_norm_that_the_architecture_leaves_out(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Aria's vision tower ends with an identity, and vLLM drops the stored norm, weight and bias."""
    folder, tensors = made(TABLE["aria"], tmp_path)
    assert {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"} < tensors.keys()
    with load_model(folder, **OPTIONS) as model:
        assert not list(model.vision_tower.post_layernorm.parameters())


def test_a_projector_that_vllm_cuts(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """vLLM takes the first rows (GLM-OCR's merger is one). Nothing is quantised in this part of the model."""
    folder, tensors = made(TABLE["aria"], tmp_path)
    name = "multi_modal_projector.feed_forward.linear_in.weight"
    first = tensors[name]
    put(folder, {**tensors, name: torch.cat([first, first])})
    with load_model(folder, **OPTIONS) as model:
        layer = model.multi_modal_projector.feed_forward.linear_in
        assert torch.allclose(layer(torch.eye(first.shape[1]))[0].t(), first, atol=1e-6)


def test_a_value_that_the_model_begins_with(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """vLLM's loader of Laguna drops this tensor, and serves the zeros that it made the parameter with."""
    folder, tensors = made(TABLE["laguna"], tmp_path)
    assert "model.layers.1.mlp.experts.e_score_correction_bias" in tensors
    with load_model(folder, **OPTIONS) as model:
        (bias,) = (p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias"))
        assert not bool(bias.any())


# --- what nobody wrote ------------------------------------------------------------------------------------------------

#: Tensors that are left out of the files, and what the error says is not loaded.
ABSENT = {
    ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight"): r"w13_weight of this rank's experts 2$",
    ("qwen3_moe", "model.layers.1.mlp.experts.0.down_proj.weight"): r"w2_weight of this rank's experts 0$",
    ("qwen3_moe", "model.layers.1.mlp.gate.weight"): r"model\.layers\.1\.mlp\.gate\.weight$",
    (
        "glm4_moe",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ): r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias$",
}


@pytest.mark.parametrize(("architecture", "name"), ABSENT)
def test_memory_that_nothing_was_written_to(
    architecture: str, name: str, tmp_path: Path, load_model: Callable[..., Any]
) -> None:
    """vLLM calls experts loaded when one of them is, and asks nothing of a router."""
    folder, tensors = made(TABLE[architecture], tmp_path)
    del tensors[name]
    put(folder, tensors)
    said = r"(?m)1 of the model's parameters were not loaded: .*" + ABSENT[architecture, name]
    with pytest.raises(LoadError, match=said):  # noqa: SIM117
        with load_model(folder, **OPTIONS):
            pass


class Largest(TorchDispatchMode):
    """Remembers the most bytes that one operator allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and look at the memory of what comes out that did not go in."""
        out = func(*args, **(kwargs or {}))
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_looking_for_it_takes_no_memory(
    tmp_path: Path, load_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask would be as large as the weights, on a device that is full of them."""
    folder, _ = made(causal("qwen3_moe", "Qwen3Moe", mlp_only_layers=[0], moe_intermediate_size=512), tmp_path)
    check, seen, sizes = serving.check_loaded, Largest(), []

    def check_loaded(model: Any, *args: Any) -> None:
        sizes.extend(p.nbytes for name, p in model.named_parameters() if "experts" in name)
        with seen:
            check(model, *args)

    monkeypatch.setattr(serving, "check_loaded", check_loaded)
    with load_model(folder, **OPTIONS):
        pass
    assert max(sizes) == 4 * 1024 * 128 * 4  # experts, rows of gate and up, features, bytes
    assert 0 < seen.bytes <= 2048  # a number for each row of the largest layer


# --- reload -----------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Float experts, embedding and head; a vocabulary that vLLM pads."""
    return made(
        causal("qwen3_moe", "Qwen3Moe", mlp_only_layers=[0], vocab_size=500), tmp_path_factory.mktemp("experts")
    )


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("name", [EXPERT, EMBEDDING, HEAD, "model.layers.1.mlp.gate.weight"])
def test_a_reload_that_leaves_out_a_float_part(
    name: str,
    load_format: str,
    experts: tuple[Path, dict[str, Tensor]],
    load_model: Callable[..., Any],
    reload_model: Callable[..., None],
) -> None:
    """Named as a linear layer's tensor is; also where nothing was reported before. A whole stream is taken."""
    folder, tensors = experts
    with load_model(folder, load_format=load_format, **OPTIONS) as model:
        with pytest.raises(LoadError, match=f"left out 1 of the model's parameters: {name}\n"):
            reload_model(model, {n: t for n, t in tensors.items() if n != name})
        reload_model(model, tensors)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_a_reload_that_leaves_out_a_quantised_vocabulary(
    module: str, suffix: str, tmp_path: Path, load_model: Callable[..., Any], reload_model: Callable[..., None]
) -> None:
    """In a model whose loader reports nothing, too."""
    model = architectures.build(causal("qwen3", "Qwen3", vocab_size=500))
    model.save_pretrained(tmp_path / "float")
    chosen = {"model.embed_tokens", "lm_head"}
    folder = tmp_path / "quant"
    write_checkpoint(
        folder, model.state_dict(), lambda m, _: "W8A16" if m in chosen else "FLOAT", files_from=tmp_path / "float"
    )
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    with load_model(folder, **OPTIONS) as served:
        load_weights = served.load_weights
        served.load_weights = lambda weights: load_weights(weights) and None
        with pytest.raises(LoadError, match=f"{module}.{suffix}"):
            reload_model(served, {n: t for n, t in tensors.items() if n != f"{module}.{suffix}"})
        reload_model(served, tensors)


@pytest.mark.parametrize("architecture", ["llama_tied", "laguna", "deepseek_v2", "gpt_oss"])
def test_a_whole_stream_is_taken(
    architecture: str, tmp_path: Path, load_model: Callable[..., Any], reload_model: Callable[..., None]
) -> None:
    """vLLM counts more elements than there are where heads are tied, and where it pads or has defaults."""
    folder, tensors = made(TABLE[architecture], tmp_path)
    with load_model(folder, **{**OPTIONS, **TABLE[architecture].engine}) as model:
        reload_model(model, tensors)
