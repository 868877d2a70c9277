"""Quantised caches of latent attention (MLA): small, and the same whatever order requests are computed in."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import QuantError

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
from caching import model_of, tokens_of_cache
from survey_kinds import DEEPSEEK_V3

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")

KEY, FLOAT_CACHE = "msmodelslim/deepseek-v3/W8A8_FAKQUANT", "msmodelslim/deepseek-v3/W8A8"
FOLDER = DATA / "checkpoints" / KEY
DESCRIPTION = "quant_model_description.json"
ATTENTION = "model.layers.1.self_attn"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{KEY} is not among the repository's copies")


def generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_what_a_page_takes(start_engine: Callable[..., Any]) -> None:
    """A byte for each feature of the latent, the rotary part as it is."""
    found = {}
    for key in (KEY, FLOAT_CACHE):
        with start_engine(DATA / "checkpoints" / key, dtype="bfloat16", **DEEPSEEK_V3) as llm:
            found[key] = tokens_of_cache(llm)
            layers = [
                layer for layer in model_of(llm).modules() if hasattr(layer, "kv_lora_rank") and hasattr(layer, "impl")
            ]
            (widths,) = {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in layers}
            if key == KEY:
                assert {(layer.kv_cache.dtype, layer.kv_cache.shape[-1]) for layer in layers} == {
                    (torch.int8, widths[0] + 2 * widths[1])
                }
    latent, rotary = widths
    assert found[KEY] / found[FLOAT_CACHE] == pytest.approx(2 * (latent + rotary) / (latent + 2 * rotary), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": True, "block_size": 32},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 8},
        {"num_gpu_blocks_override": 20, "max_model_len": 256},  # of 16 tokens
    ],
    ids=["a batch", "prefix caching", "chunked prefill", "preemption"],
)
def test_the_tokens_of_one_by_one(options: dict[str, Any], start_engine: Callable[..., Any], reference: Any) -> None:
    ids = [token for prompt in reference.prompts for token in prompt]
    prompts = [(ids[17 * i :] + ids)[: 5 + 13 * i % 160] for i in range(12)]
    with start_engine(FOLDER, max_num_seqs=1, **DEEPSEEK_V3) as llm:
        expected = [generate(llm, [prompt])[0] for prompt in prompts]
    with start_engine(FOLDER, **DEEPSEEK_V3, **options) as llm:
        assert [generate(llm, prompts) for _ in range(2)] == [expected] * 2


# --- bad input --------------------------------------------------------------------------------------------------------


def without_scales(folder: Path, prefix: str, keys: bool) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors, said = load_file(file), json.loads((folder / DESCRIPTION).read_text())
    for name in [name for name in tensors if ".fa_" in name and name.startswith(prefix)]:
        del tensors[name], said[name]
    if not keys:
        said = {
            key: value for key, value in said.items() if not (key.startswith(prefix) and key.endswith(".quant_type"))
        }
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(said))


def test_a_layer_that_claims_a_type_and_has_no_scales(
    checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    folder = checkpoint(KEY)
    without_scales(folder, ATTENTION, keys=True)
    with pytest.raises(QuantError, match=rf"{ATTENTION}\.quant_type") as raised, load_model(folder, **DEEPSEEK_V3):
        pass
    assert f"{ATTENTION}.fa_k.scale" in str(raised.value)


def test_a_checkpoint_that_claims_a_type_and_has_no_scales(
    checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    folder = checkpoint(KEY)
    without_scales(folder, "", keys=False)
    with pytest.raises(QuantError, match="fa_quant_type: 'FAKQuant'"), load_model(folder, **DEEPSEEK_V3):
        pass


def test_a_float_cache_in_one_layer(checkpoint: Callable[[str], Path], start_engine: Callable[..., Any]) -> None:
    """Layers are chosen one by one."""
    folder = checkpoint(KEY)
    without_scales(folder, ATTENTION, keys=False)
    with start_engine(folder, **DEEPSEEK_V3) as llm:
        types = {quant.quant_type for quant in llm.llm_engine.vllm_config.quant_config.layers.values()}
        assert len(generate(llm, [[1, *range(20, 60)]])[0]) == 16
    assert "FAKQuant" in types
