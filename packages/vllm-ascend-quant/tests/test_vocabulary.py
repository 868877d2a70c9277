"""Quantised `lm_head` and embeddings, beside a float model with the same numbers."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from quant_core import LimitError, LoadError
from quant_modelslim.writer import write_checkpoint
from vllm_ascend_quant.methods.embedding import AscendEmbeddingMethod

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import ranks
import storing

#: Not a multiple of what vLLM pads vocabularies to.
VOCABULARY = 500
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
TOKENIZER = DATA / "models" / "qwen3"
QWEN3 = ("qwen3", "Qwen3ForCausalLM")
PROMPTS = [[1, *range(20, 60)], [1, *range(300, 320), 499]]
SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 128}
WEIGHTS = ("lm_head.weight", "model.embed_tokens.weight")


def make(
    folder: Path, quant_type: str, architecture: tuple[str, str] = QWEN3, *, tied: bool = False
) -> tuple[Path, Path]:
    """A checkpoint whose head and embedding are quantised, and a float one whose weights are their dequantised ones.

    Tied, the files hold the embedding alone.
    """
    config = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    model = architectures.build(architectures.Architecture(*architecture, config))
    model.save_pretrained(folder / "float")
    (weights,) = (folder / "float").glob("*.safetensors")
    tensors = load_file(weights)
    quantised = {name.removesuffix(".weight") for name in WEIGHTS}
    write_checkpoint(
        folder / "quant",
        tensors,
        lambda module, _: quant_type if module in quantised else "FLOAT",
        files_from=folder / "float",
    )
    (file,) = (folder / "quant").glob("*.safetensors")
    stored = load_file(file)
    for name in WEIGHTS if quant_type.startswith("W8") else ():
        if name in tensors:
            tensors[name] = stored[name].float() * stored[name.replace("weight", "weight_scale")]
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder / "quant", folder / "float"


def logprobs(answers: list[dict[str, Any]]) -> Any:
    """Those of all prompts and answers, in one array."""
    return np.concatenate([one["prompt_logprobs"] + one["generated_logprobs"] for one in answers])


@pytest.mark.xdist_group("engines of several processes")
def test_head_and_embedding_have_their_numbers(
    tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """Weight-only, so that the float model computes the same; in eager mode, after a reload, and on two ranks."""
    quantised, plain = make(tmp_path, "W8A16")
    with start_engine(plain, **SETTINGS) as llm:
        expected = logprobs(ask(llm, PROMPTS))
    with start_engine(quantised, **SETTINGS) as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        for layer in (model.lm_head, model.model.embed_tokens):
            assert isinstance(layer.quant_method, AscendEmbeddingMethod)
            assert {p.dtype for p in layer.parameters()} == {torch.int8, torch.float32}
        found = logprobs(ask(llm, PROMPTS))
        llm.collective_rpc("reload_weights")
        reloaded = logprobs(ask(llm, PROMPTS))
    two = ranks.Engine(quantised, PROMPTS, tensor_parallel_size=2, enforce_eager=False, **SETTINGS).answers()
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(reloaded, found)
    assert np.abs(logprobs(two) - expected).max() < 1e-4


def test_an_embedding_without_a_name(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """vLLM's Llama gives its embedding none, so it is decided, and made again, once the model is built."""
    quantised, plain = make(tmp_path, "W8A16", ("llama", "LlamaForCausalLM"))
    (file,) = plain.glob("*.safetensors")
    with load_model(quantised, **SETTINGS) as model:
        layer = model.model.embed_tokens
        assert isinstance(layer.quant_method, AscendEmbeddingMethod)
        assert torch.equal(rows(layer, torch.arange(VOCABULARY)), load_file(file)["model.embed_tokens.weight"])


def test_a_head_that_quantises_its_activations(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """`lm_head` is a linear layer of its type, padded with rows whose logits are zero."""
    quantised, plain = make(tmp_path, "W8A8_DYNAMIC")
    with load_model(quantised, **SETTINGS) as model:
        x = torch.randn(5, model.config.hidden_size)
        head = model.lm_head
        found = head.quant_method.apply(head, x)
    assert found.shape[1] % 64 == 0
    assert torch.equal(found[:, VOCABULARY:], torch.zeros(5, found.shape[1] - VOCABULARY))
    (file,) = plain.glob("*.safetensors")
    scale = x.double().abs().amax(1, keepdim=True) / 127
    expected = (x.double() / scale).round() * scale @ load_file(file)["lm_head.weight"].double().t()
    torch.testing.assert_close(found[:, :VOCABULARY].double(), expected, rtol=1e-4, atol=1e-4)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], **config: Any) -> None:
    """Change tensors and description of a checkpoint, and its config.json."""
    (weights,) = folder.glob("*.safetensors")
    description = folder / "quant_model_description.json"
    tensors, types = load_file(weights), json.loads(description.read_text())
    change(tensors, types)
    save_file(tensors, weights, metadata={"format": "pt"})
    description.write_text(json.dumps(types))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def make_static(folder: Path, module: str) -> None:
    """Store a W8A8_DYNAMIC module as W8A8."""

    def change(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        old = [name for name in tensors if name.startswith(f"{module}.")]
        weight = tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"]
        for name in old:
            del tensors[name], types[name]
        stored = {f"{module}.{suffix}": tensor for suffix, tensor in storing.static(weight).items()}
        tensors.update(stored)
        types.update(dict.fromkeys(stored, "W8A8"))

    rewrite(folder, change)


def store_the_head(folder: Path) -> None:
    """Store a tied embedding under the head's name as well, and untie them."""

    def change(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("model.embed_tokens.")]:
            head = name.replace("model.embed_tokens", "lm_head")
            tensors[head], types[head] = tensors[name].clone(), types[name]

    rewrite(folder, change, tie_word_embeddings=False)


def test_a_head_of_its_own_in_a_tied_model(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """vLLM unties what the checkpoint stores twice; an older one leaves the head's weight out, which is refused."""
    quantised, _ = make(tmp_path, "W8A16")
    rewrite(quantised, lambda tensors, types: None, tie_word_embeddings=True)
    if not hasattr(ModelConfig, "maybe_untie_word_embeddings"):
        with pytest.raises(LimitError, match="set tie_word_embeddings to false"), load_model(quantised, **SETTINGS):
            pass
        return
    with load_model(quantised, **SETTINGS) as model:
        assert model.lm_head is not model.model.embed_tokens
        assert isinstance(model.lm_head.quant_method, AscendEmbeddingMethod)


#: Of each way in which models let their embedding be the head, one.
TIED = {
    "vLLM's tie_weights": QWEN3,
    "the embedding is made again": ("llama", "LlamaForCausalLM"),
    "no head at all": ("gemma2", "Gemma2ForCausalLM"),
}


@pytest.mark.parametrize("architecture", TIED.values(), ids=TIED)
def test_a_table_that_is_looked_up_and_multiplied(
    architecture: tuple[str, str], tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """As the float model with the dequantised table; after a reload too."""
    quantised, plain = make(tmp_path, "W8A16", architecture, tied=True)
    with start_engine(plain, **SETTINGS) as llm:
        expected = logprobs(ask(llm, PROMPTS))
    with start_engine(quantised, **SETTINGS) as llm:
        found = logprobs(ask(llm, PROMPTS))
        llm.collective_rpc("reload_weights")
        reloaded = logprobs(ask(llm, PROMPTS))
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(reloaded, found)


@pytest.mark.parametrize("quant_type", ["W8A8_DYNAMIC", "W8A8"])
def test_a_tied_head_quantises_its_input(
    quant_type: str, tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]
) -> None:
    """As a model whose files hold the same table twice. A static type's scale of the input is the head's."""
    folder, _ = make(tmp_path, "W8A8_DYNAMIC", tied=True)
    if quant_type == "W8A8":
        make_static(folder, "model.embed_tokens")
    with start_engine(folder, **SETTINGS) as llm:
        found = logprobs(ask(llm, PROMPTS))
    store_the_head(folder)
    with start_engine(folder, **SETTINGS) as llm:
        assert np.array_equal(logprobs(ask(llm, PROMPTS)), found)


@pytest.mark.xdist_group("engines of several processes")
def test_a_tied_table_on_two_ranks(tmp_path: Path, start_engine: Callable[..., Any], ask: Callable[..., Any]) -> None:
    quantised, plain = make(tmp_path, "W8A16", tied=True)
    with start_engine(plain, **SETTINGS) as llm:
        expected = logprobs(ask(llm, PROMPTS))
    two = ranks.Engine(quantised, PROMPTS, tensor_parallel_size=2, enforce_eager=False, **SETTINGS).answers()
    assert np.abs(logprobs(two) - expected).max() < 1e-4


def test_a_weight_that_a_model_assigns(tmp_path: Path, load_model: Callable[..., Any], monkeypatch: Any) -> None:
    """Some models write `head.weight = embedding.weight` (ChatGLM), as every `tie_weights` of older vLLMs did."""

    def assign(head: Any, embedding: Any) -> Any:
        head.weight = embedding.weight
        return head

    monkeypatch.setattr(ParallelLMHead, "tie_weights", assign)
    for name, quant_type in (("qwen3", "W8A16"), ("llama", "FLOAT")):
        architecture = (name, "Qwen3ForCausalLM" if name == "qwen3" else "LlamaForCausalLM")
        quantised, plain = make(tmp_path / name, quant_type, architecture, tied=True)
        (file,) = plain.glob("*.safetensors")
        table = load_file(file)["model.embed_tokens.weight"]
        with load_model(quantised, **SETTINGS) as model:
            hidden = torch.randn(3, model.config.hidden_size)
            logits = model.compute_logits(hidden)
        torch.testing.assert_close(logits, hidden @ table.t(), rtol=1e-4, atol=1e-4)


def test_a_tied_table_whose_rows_share_bytes(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Such rows cannot be looked up one by one."""
    folder, _ = make(tmp_path, "W4A8_DYNAMIC", tied=True)
    with pytest.raises(LimitError, match="the rows of an embedding cannot be looked up in W4A8_DYNAMIC"):  # noqa: SIM117
        with load_model(folder, **SETTINGS):
            pass


def test_a_head_that_is_made_while_loading(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """vLLM's rerankers tie one to the embedding, and take two of its rows as if they were float."""
    folder, _ = make(tmp_path, "W8A16", tied=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    settings = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["A", "B"],
        "is_original_qwen3_reranker": True,
    }
    with pytest.raises(LimitError, match="lm_head: the model makes it while loading"):  # noqa: SIM117
        with load_model(folder, runner="pooling", hf_overrides=settings, max_model_len=128):
            pass


def test_a_vocabulary_of_another_size(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    quantised, _ = make(tmp_path, "W8A16")
    file = quantised / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": VOCABULARY + 4}))
    message = rf"{VOCABULARY}, 128.*{VOCABULARY + 4}, 128"
    with pytest.raises(LoadError, match=message), load_model(quantised, **SETTINGS):
        pass


def rows(layer: Any, ids: Tensor) -> Tensor:
    """What an embedding answers."""
    found: Tensor = layer.quant_method.embedding(layer, ids)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedding_in_every_shape_of_ids(dtype: str, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    quantised, plain = make(tmp_path, "W8A8_DYNAMIC")
    (file,) = plain.glob("*.safetensors")
    expected = load_file(file)["model.embed_tokens.weight"].to(getattr(torch, dtype))
    with load_model(quantised, dtype=dtype, **SETTINGS) as model:
        layer = model.model.embed_tokens
        for ids in (torch.tensor([3, 499, 3]), torch.zeros(0, dtype=torch.long), torch.tensor([[0, 1], [7, 2]])):
            assert torch.equal(rows(layer, ids), expected[ids])
