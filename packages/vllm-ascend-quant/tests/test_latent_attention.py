"""vLLM's latent attention (MLA) reads the weight of `kv_b_proj`, and asks for its dtype, behind the layer's back."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core import LimitError
from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import storing
from survey_kinds import MLA, NATIVE
from versions import lacking

ENGINE: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, **NATIVE}
PROMPTS = [[1, *range(20, 44)], [1, *range(300, 320), 499]]

FIRST = "model.layers.0.self_attn.kv_b_proj"

#: The tensors that store a weight, and the weight that they mean.
Stored = tuple[dict[str, Tensor], Tensor]

pytestmark = pytest.mark.skipif(bool(lacking("latent attention")), reason=lacking("latent attention"))


def make(folder: Path, store: Callable[[Tensor], Stored], quant_type: str) -> dict[str, Tensor]:
    """A DeepSeek-V3 of two dense layers, with a third that drafts, whose kv_b_proj are quantised; what these mean."""
    config = {**MLA, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1}
    model = architectures.build(architectures.Architecture("deepseek_v3", "DeepseekV3ForCausalLM", config))
    model.save_pretrained(folder / "float")
    (file,) = (folder / "float").glob("*.safetensors")
    tensors = load_file(file)
    drafting = "model.layers.2"
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("model.layers.1", drafting)] = tensors[name].clone()
    hidden = tensors["model.norm.weight"].shape[0]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{drafting}.{name}.weight"] = torch.ones(hidden)
    tensors[f"{drafting}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) / hidden
    tensors[f"{drafting}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{drafting}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    write_checkpoint(folder / "quant", tensors, lambda *_: "FLOAT", files_from=folder / "float")
    (file,) = (folder / "quant").glob("*.safetensors")
    description = folder / "quant" / storing.DESCRIPTION
    types = json.loads(description.read_text())
    stored, exact = dict(tensors), {}
    for module in [name.removesuffix(".weight") for name in tensors if name.endswith("kv_b_proj.weight")]:
        del stored[f"{module}.weight"], types[f"{module}.weight"]
        parts, exact[module] = store(tensors[f"{module}.weight"])
        for suffix, tensor in parts.items():
            stored[f"{module}.{suffix}"], types[f"{module}.{suffix}"] = tensor.contiguous(), quant_type
    save_file(stored, file, {"format": "pt"})
    description.write_text(json.dumps(types))
    return exact


def weight_only(weight: Tensor) -> Stored:
    """W8A16."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def static(weight: Tensor) -> Stored:
    """W8A8 for inputs of which 1.0 is not one."""
    stored, scale = storing.static(weight), 0.07
    row_scale = stored["deq_scale"] * 64
    stored |= {"input_scale": torch.tensor([scale]), "deq_scale": row_scale * scale}
    return stored, stored["weight"] * row_scale[:, None]


def turned(weight: Tensor) -> Stored:
    """W4A4_FLATQUANT_DYNAMIC, whose inputs are turned before they are quantised."""
    left, right = (torch.linalg.qr(torch.randn(size, size))[0] for size in (16, 32))
    rows = (left.t() @ weight.unflatten(1, (16, 32)) @ right).flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 7
    codes = (rows / scale).round()
    stored = {"weight": codes.to(torch.int8), "weight_scale": scale, "left_trans": left, "right_trans": right}
    stored["clip_ratio"] = torch.tensor([1.0])
    return stored, (left @ (codes * scale).unflatten(1, (16, 32)) @ right.t()).flatten(1)


def test_served_with_a_draft(tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]) -> None:
    """Several tokens after a cached context: vLLM casts what it cached to the dtype of the weight, int8 here.

    Weight-only, since it quantises no activations where it absorbs the weight, for one token at a time.
    """
    make(tmp_path, weight_only, "W8A16")
    with start_engine(tmp_path / "quant", **ENGINE) as llm:
        expected = ask(llm, PROMPTS)
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    with start_engine(tmp_path / "quant", speculative_config=speculative, **ENGINE) as llm:
        found = ask(llm, PROMPTS)
        llm.collective_rpc("reload_weights")
        again = ask(llm, PROMPTS)
    for answers in (found, again):
        for one, other in zip(answers, expected, strict=True):
            assert one["generated"] == other["generated"]
            for key in ("prompt_logprobs", "generated_logprobs"):
                torch.testing.assert_close(torch.tensor(one[key]), torch.tensor(other[key]), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("store", "quant_type"),
    [(weight_only, "W8A16"), (static, "W8A8"), (turned, "W4A4_FLATQUANT_DYNAMIC")],
    ids=["W8A16", "W8A8", "W4A4_FLATQUANT_DYNAMIC"],
)
def test_the_absorbed_weights(
    store: Callable[[Tensor], Stored], quant_type: str, tmp_path: Path, load_model: Callable[..., Any]
) -> None:
    """vLLM would look at them with unit vectors, which not every type quantises without error."""
    from vllm.model_executor.layers.attention import mla_attention  # not in every vLLM

    exact = make(tmp_path, store, quant_type)
    with load_model(tmp_path / "quant", **ENGINE) as model:
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn.mla_attn.mla_attn
            found = torch.cat([attention.W_UK_T, attention.W_UV.transpose(1, 2)], dim=1).flatten(0, 1)
            weight = exact[f"model.layers.{number}.self_attn.kv_b_proj"]
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
        projection = model.model.layers[0].self_attn.kv_b_proj
        if quant_type == "W8A16":
            torch.testing.assert_close(
                mla_attention.get_and_maybe_dequant_weights(projection), exact[FIRST], rtol=1e-5, atol=1e-6
            )
        else:  # as after a saved state was restored: nothing but the run-time form
            with pytest.raises(LimitError, match="needs this layer's weight in float"):
                mla_attention.get_and_maybe_dequant_weights(projection)
