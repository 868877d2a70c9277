"""Code of vLLM that reads a layer's weight behind the layer's back: what is served, and what is refused by name."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from safetensors.torch import load_file, save_file
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from quant_core import LimitError
from quant_modelslim.writer import write_checkpoint
from vllm_ascend_quant.placement.reading import reads

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import arithmetic
from survey_table import TABLE

SOURCE = Path(vllm.__file__).parent

#: Parts of vLLM that no CPU and no NPU runs, and that are no models.
ELSEWHERE = (
    "nvidia", "amd", "xpu", "rocm", "kernels", "quantization", "lora", "benchmarks", "entrypoints", "third",
)  # fmt: skip

#: What vLLM's code calls the layers whose weight it reads, but for what is served wherever it stands: the dtype while a
#: model is built or loaded, and ties. Of most of them some class has a linear layer, another one a convolution.
SERVED = {"kv_b_proj": "latent attention, which gets the float weight (test_latent_attention.py)"}
COMPARED = {
    "model.model.embed_tokens": "of a draft and its target, which share it if it is equal: only proposals differ",
    "model.lm_head": "the same",
}
REFUSED = {
    "convolutions that are linear layers": {"conv", "conv1d", "q_conv1d", "k_conv1d", "v_conv1d"},
    "routers that are fused": {"gate", "shared_expert_gate"},
    "inputs that are cast to the weight's dtype": {
        "aligner.w1", "embed_audio.embedding_projection", "embed_tokens", "embed_vision.embedding_projection",
        "encoder.input_linear", "proj", "projection", "vision_embedding.linear_fc1",
    },
    "patches and positions of images": {
        "embeddings.patch_embedding", "image_vit.patch_embedding", "patch_embed.patchifier.proj", "patch_embed.proj",
        "patch_embedding", "position_embedding", "vision_backbone.dinov2_featurizer.patch_embed.proj",
        "vision_model.embeddings.patch_embedding", "vision_tower.vision_model.embeddings.patch_embedding",
        "vpm.embeddings.patch_embedding",
    },
    "parts that are multiplied by themselves": {
        "bert.embeddings.word_embeddings", "compressor.fused_wkv_wgate", "factor_input_proj", "fused_wkv_wgate",
        "in_head", "k_proj", "lm_head", "markov_w2", "oe_embedder", "out_head", "qkv_proj", "wk_weights_proj",
    },
    "no layer": {"args.linear"},
}  # fmt: skip

TYPE = "W8A16"
ENGINE: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True}


def quantise(folder: Path, name: str, chosen: tuple[str, ...]) -> None:
    """A checkpoint with the chosen layers quantised, and the float model beside it with what they mean."""
    tiny = architectures.make(TABLE[name], folder)

    def choose(module: str, _: Any) -> str:
        return TYPE if module.rpartition(".")[2] in chosen else "FLOAT"

    write_checkpoint(folder / "stored", tiny.tensors, choose, files_from=folder / "float")
    (file,), (weights,) = ((folder / kind).glob("*.safetensors") for kind in ("stored", "float"))
    stored, tensors = load_file(file), load_file(weights)
    changed = [tensor.removesuffix("_scale") for tensor in stored if tensor.endswith(".weight_scale")]
    assert {tensor.split(".")[-2] for tensor in changed} == set(chosen)
    for tensor in changed:
        tensors[tensor] = stored[tensor].float() * stored[f"{tensor}_scale"]
    save_file(tensors, weights, {"format": "pt"})


def test_the_dtype_is_asked_for_while_a_model_is_built(tmp_path: Path, start_engine: Callable[..., Any]) -> None:
    """Gemma 3n makes scales in the dtype of its router's and its embedding's weight: in int8 they would be zero."""
    quantise(tmp_path, "gemma3n_text", ("modality_router", "embed_tokens"))
    answers = []
    for kind in ("float", "stored"):
        with start_engine(tmp_path / kind, **{**ENGINE, **TABLE["gemma3n_text"].engine}) as llm:
            answers.append(arithmetic.vllm_logprobs(llm, arithmetic.prompts()))
    assert arithmetic.differences(*answers)[1] < 1e-3


class Reading(Qwen3ForCausalLM):
    """A model that casts to the dtype of a layer's weight, as some do with the pixels of an image."""

    def compute_logits(self, hidden_states: torch.Tensor) -> Any:
        """Nothing at all, for a quantised layer."""
        return super().compute_logits(hidden_states.to(self.model.layers[0].mlp.down_proj.weight.dtype))


@pytest.fixture
def reading_model() -> Iterator[None]:
    """While it lasts, Qwen3 is a model that reads a weight."""
    before = ModelRegistry.models["Qwen3ForCausalLM"]
    ModelRegistry.register_model("Qwen3ForCausalLM", Reading)
    yield
    ModelRegistry.models["Qwen3ForCausalLM"] = before


@pytest.mark.usefixtures("reading_model")
def test_a_model_that_reads_a_weight(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Only the layers of that name are concerned, of a model that vLLM does not know."""
    quantise(tmp_path / "a", "qwen3", ("up_proj", "gate_proj"))
    with load_model(tmp_path / "a" / "stored", **ENGINE):
        pass
    quantise(tmp_path / "b", "qwen3", ("down_proj",))
    message = r"layers\.0\.mlp\.down_proj is W8A16, (.|\n)*test_weight_readers\.py:\d+: .*down_proj\.weight\.dtype"
    with pytest.raises(LimitError, match=message), load_model(tmp_path / "b" / "stored", **ENGINE):
        pass


def test_every_place_in_vllm_is_known() -> None:
    """Of attributes that hold linear or vocabulary layers somewhere in vLLM."""
    trees = {
        file.relative_to(SOURCE): ast.parse(file.read_text(encoding="utf-8"))
        for file in SOURCE.rglob("*.py")
        if not set(ELSEWHERE) & set(re.split(r"[/_.]", file.relative_to(SOURCE).as_posix()))
    }
    layers = attributes_of(trees)
    found = {".".join(read.layer) for file in trees for read in reads(str(SOURCE / file)) if read.layer[-1] in layers}
    known = {*SERVED, *COMPARED}.union(*REFUSED.values())
    assert {"conv1d", "patch_embed.proj"} <= found
    if Version(vllm.__version__) >= Version("0.32"):  # later: say what becomes of a new one
        assert found == known


def attributes_of(trees: dict[Path, ast.Module]) -> set[str]:
    """The attributes to which a linear or vocabulary layer is assigned anywhere."""
    below: dict[str, set[str]] = defaultdict(set)
    for tree in trees.values():
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                below[ast.unparse(base).rpartition(".")[2]].add(node.name)  # type: ignore[attr-defined]
    kinds = ["LinearBase", "VocabParallelEmbedding"]
    for kind in kinds:
        kinds += sorted(below[kind] - set(kinds))
    return {
        target.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(
            ast.unparse(c.func).rpartition(".")[2] in kinds for c in ast.walk(node.value) if isinstance(c, ast.Call)
        )
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }


@pytest.mark.parametrize(("method", "found"), [("_init_weights", 0), ("__init__", 0), ("forward", 1)])
def test_code_that_no_served_model_runs(method: str, found: int, tmp_path: Path) -> None:
    """As transformers' models have it, in the method that gives new ones their first values."""
    file = tmp_path / "modeling.py"
    file.write_text(f"class Model:\n    def {method}(self, module):\n        normal_(module.c_proj.weight, std=1.0)\n")
    assert len(reads(str(file))) == found
