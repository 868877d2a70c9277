"""A quantised head with one output feature, as reward models have it, in each int8 type.

Its weight [1, hidden] is a matrix with one row, and its transpose one with one column: native int8 products were seen
to take them for other matrices.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_core.ops.cpu import int8_gemm
from quant_modelslim.writer import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures

#: vLLM makes scoring models with a tokenizer only.
TOKENIZER = Path(__file__).parents[3] / "testdata" / "models" / "qwen3"
PROMPTS = [[1, *range(20, 60)], [1, 7], [1, *range(300, 320), 499]]
WEIGHTS, DESCRIPTION = "quant_model_weights.safetensors", "quant_model_description.json"

Rule = Callable[[Tensor, dict[str, Tensor]], Tensor]


def per_token(x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """(a qᵀ) · x_scale · weight_scale."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale @ (stored["weight"] * stored["weight_scale"]).t()


def static(x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """(a qᵀ + quant_bias) · deq_scale."""
    codes = (x / stored["input_scale"] + stored["input_offset"]).round().clamp(-128, 127)
    return (codes @ stored["weight"].t() + stored["quant_bias"]) * stored["deq_scale"]


def weight_only(x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """x (q · weight_scale)ᵀ."""
    return x @ (stored["weight"] * stored["weight_scale"]).t()


TYPES: dict[str, Rule] = {
    "W8A8": static,
    "W8A8S": static,
    "W8A8_DYNAMIC": per_token,
    "W8A8_MIX": per_token,
    "W8A16": weight_only,
}


def make(folder: Path, quant_type: str) -> tuple[Any, dict[str, Tensor]]:
    """A model with one label whose head alone is quantised: transformers' float one, and the head's tensors."""
    labels = {"id2label": {0: "score"}, "label2id": {"score": 0}}
    model = architectures.build(architectures.Architecture("qwen3", "Qwen3ForSequenceClassification", labels))
    model.save_pretrained(folder / "float")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / "float" / name)
    write_checkpoint(
        folder / "quant",
        model.state_dict(),
        lambda module, _: "W8A8_DYNAMIC" if module == "score" else "FLOAT",
        files_from=folder / "float",
    )
    tensors = load_file(folder / "quant" / WEIGHTS)
    stored = {name.removeprefix("score."): t for name, t in tensors.items() if name.startswith("score.")}
    assert stored["weight"].shape[0] == 1
    if TYPES[quant_type] is static or quant_type == "W8A8_MIX":
        scale, offset = torch.tensor([0.03]), torch.tensor([-5.0])
        stored |= {"input_scale": scale, "input_offset": offset, "deq_scale": stored["weight_scale"][:, 0] * scale}
        stored["quant_bias"] = (-offset * stored["weight"].sum(1)).round().to(torch.int32)
    save_file({**tensors, **{f"score.{name}": t for name, t in stored.items()}}, folder / "quant" / WEIGHTS)
    file = folder / "quant" / DESCRIPTION
    types = json.loads(file.read_text()) | {f"score.{name}": quant_type for name in stored}
    file.write_text(json.dumps(types))
    return model, {name: t.double() for name, t in stored.items()}


@torch.no_grad()
def hidden_states(model: Any) -> Tensor:
    """What the head gets: of each prompt the last token's, float64."""
    return torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in PROMPTS]).double()


@pytest.mark.parametrize("quant_type", TYPES)
def test_one_score(
    quant_type: str, tmp_path: Path, start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every int8 product that is right on this processor."""
    from vllm import PoolingParams

    model, stored = make(tmp_path, quant_type)
    x = hidden_states(model)
    expected = TYPES[quant_type](x, stored).flatten()
    # A hidden state on the border between two codes may go either way: one code, times the largest weight.
    step = max(x.abs().max().item() / 127, 0.03) * model.score.weight.abs().max().item()
    candidates = [c for c in int8_gemm.CANDIDATES if int8_gemm.refusal(c) is None]
    assert candidates
    with start_engine(tmp_path / "quant", runner="pooling") as llm:
        for candidate in candidates:
            monkeypatch.setattr(int8_gemm, "choose", lambda rows, candidate=candidate: candidate)
            given = [{"prompt_token_ids": ids} for ids in PROMPTS]
            answers = llm.encode(given, PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False)
            found = torch.cat([answer.outputs.data.flatten() for answer in answers]).double()
            assert bool(((found - expected).abs() <= step).all()), (candidate.__name__, found, expected)
            assert found.std() > step, "scores that are told apart"
