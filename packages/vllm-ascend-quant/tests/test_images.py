"""A model that sees images: its tower runs on pictures, float or quantised, and the answers are transformers'.

vLLM looks at such a model with transformers' image processors, which need torchvision (`noxfile.py`, `install_vllm`).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import architectures
import arithmetic
from survey_table import TABLE

SPECIAL = {"<|vision_start|>": 3, "<|vision_end|>": 4, "<|image_pad|>": 5, "<|video_pad|>": 6}
TOKENS = {f"<{number}>": number for number in range(512) if number not in SPECIAL.values()} | SPECIAL
NAMES = {number: token for token, number in TOKENS.items()}
#: Before vLLM puts one image token for every part of the picture there.
PROMPT = [453, 386, 274, 3, 5, 4, 419, 414, 108, 456, 257, 33, 71]
WIDTH, HEIGHT, PART = 140, 84, 28

ARCHITECTURE = replace(
    TABLE["qwen2_5_vl"],
    config={
        **TABLE["qwen2_5_vl"].config,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
    },
)
ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "limit_mm_per_prompt": {"image": 1, "video": 0}}

Answer = tuple[list[int], list[float]]  # the tokens, and the log-probability of each after the first


def processor() -> Any:
    """Transformers' processor of this architecture with a vocabulary of our own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = Tokenizer(WordLevel(TOKENS, unk_token="<0>"))
    words.pre_tokenizer = WhitespaceSplit()
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<2>", pad_token="<0>", extra_special_tokens=named
    )
    image_processor = Qwen2VLImageProcessor(min_pixels=PART**2, max_pixels=PART**2 * 64)
    return Qwen2_5_VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor())


def pictures() -> list[Image.Image]:
    """Two of noise."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(2)]


@torch.no_grad()
def transformers_answers(model: nn.Module, processor: Any) -> list[Answer]:
    """What transformers' model makes of the prompt with each picture."""
    text, answers = " ".join(NAMES[number] for number in PROMPT), []
    for picture in pictures():
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        logprobs = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
        ids = inputs["input_ids"][0].tolist()
        answers.append((ids, [logprobs[i, token].item() for i, token in enumerate(ids[1:])]))
    return answers


def vllm_answers(llm: Any) -> list[Answer]:
    """The same from an engine."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": PROMPT, "multi_modal_data": {"image": picture}} for picture in pictures()]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        ids = list(output.prompt_token_ids)
        answers.append((ids, [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]))
    return answers


def numbers(answers: list[Answer]) -> list[list[float]]:
    """The log-probabilities alone."""
    return [logprobs for _, logprobs in answers]


@pytest.mark.parametrize("tower", ["float", "quantised"])
def test_answers_about_pictures(tower: str, tmp_path: Path, start_engine: Callable[..., Any]) -> None:
    """Prompts with a picture have the probabilities that transformers computes, after a reload too."""
    left_float = architectures.LEFT_FLOAT if tower == "float" else frozenset({"lm_head"})
    tiny = architectures.make(replace(ARCHITECTURE, left_float=left_float), tmp_path)
    assert any(module.startswith("visual.") for module in tiny.expected) == (tower == "quantised")
    maker = processor()
    maker.save_pretrained(tmp_path / "quant")
    float_answers = transformers_answers(tiny.model, maker)
    arithmetic.quantise_reference(tiny)
    reference = transformers_answers(tiny.model, maker)
    with start_engine(tmp_path / "quant", **ENGINE) as llm:
        layers = arithmetic.inspect_layers(llm)
        answers = vllm_answers(llm)
        llm.collective_rpc("reload_weights")
        llm.llm_engine.reset_encoder_cache()  # the worker forgets its pictures with the old weights, the scheduler not
        again = vllm_answers(llm)
    assert not layers.wrong
    assert set(layers.claimed) == tiny.expected
    assert [ids for ids, _ in answers] == [ids for ids, _ in reference]
    assert answers[0][0].count(SPECIAL["<|image_pad|>"]) == (WIDTH // PART) * (HEIGHT // PART)
    median, _ = arithmetic.differences(numbers(answers), numbers(reference))
    assert median < 2e-5
    # The float model and the other picture are far enough away for the comparison to mean something.
    assert arithmetic.differences(numbers(float_answers), numbers(reference))[0] > 100 * median
    after = [logprobs[-len(PROMPT) + 5 :] for logprobs in numbers(answers)]  # of the words behind the picture
    assert arithmetic.differences(after[:1], after[1:])[0] > 100 * median
    assert again == answers
