"""Loaders that cut, fuse or rearrange the rows of a weight: what belongs to a row follows, however it is stored."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_core import QuantError
from vllm_ascend_quant.methods.rows import HandedOut

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file
import arithmetic
import storing
from survey_table import TABLE

#: What each loader does with rows.
LOADERS = {
    "phi3": "takes q, k and v, and gate and up from one tensor",
    "llama4_text": "permutes the rows of q and k, going by the names of tensors",
    "bloom": "regroups the heads of a fused query_key_value",
    "falcon": "regroups the heads of a fused query_key_value",
    "zamba2": "renames the `0.weight` of adapters, and nothing else that is stored beside it",
}


#: What vLLM's loaders cannot rearrange, and the tensor that the error names.
REFUSED = {
    **{
        (name, way): f"rearranges the rows of .*({module}).weight"
        for name, module in {"llama4_text": "q_proj|k_proj", "bloom": "query_key_value"}.items()
        for way in ("W4A16 groups", "W4A8_DYNAMIC", "W4A8_DYNAMIC two stages")  # two rows to a byte
    },
    ("bloom", "W8A8 static"): r"query_key_value .* stopped at input_(scale|offset)",
}


@pytest.mark.parametrize("way", storing.WAYS)
@pytest.mark.parametrize("name", LOADERS)
def test_each_layer_multiplies_by_its_weight(
    name: str, way: str, tmp_path: Path, load_model: Callable[..., Any]
) -> None:
    """Compared with the float model as vLLM loads it, up to half a step of the quantised weight."""
    storing.make(tmp_path, TABLE[name], way)
    with load_model(tmp_path / "float", skip_tokenizer_init=True) as model:
        exact = arithmetic.weights_of(model, with_bias=True)
    refused = REFUSED.get((name, way))
    with contextlib.nullcontext() if refused is None else pytest.raises(QuantError, match=refused):  # noqa: SIM117
        with load_model(tmp_path / "quant", skip_tokenizer_init=True) as model:
            assert not arithmetic.wrong_weights(
                arithmetic.weights_of(model, with_bias=True), exact, storing.WAYS[way][2]
            )


def test_rows_follow_at_reload(tmp_path: Path, start_engine: Callable[..., Any]) -> None:
    """vLLM loads through copies of the parameters then, and processes a layer when its last tensor has come.

    After dummy weights the loader is asked at the first reload. If a layer's last tensor is a rearranged weight, the
    answer comes too late.
    """
    storing.make(tmp_path, TABLE["llama4_text"], "W8A8 static")
    tensors = load_file(tmp_path / "quant" / "quant_model_weights.safetensors")
    last = "model.layers.0.self_attn.q_proj.weight"

    def reload(tensors: dict[str, torch.Tensor]) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})

    options = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True}
    with start_engine(tmp_path / "quant", **options) as llm:
        fresh = arithmetic.layer_weights(llm)
        reload({**{n: t for n, t in tensors.items() if n != last}, last: tensors[last]})
        again = arithmetic.layer_weights(llm)
    with start_engine(tmp_path / "quant", **options, load_format="dummy") as llm:
        with pytest.raises(QuantError, match=r"rearranges the rows of .*q_proj\.weight"):
            reload({**{n: t for n, t in tensors.items() if n != last}, last: tensors[last]})
        reload(tensors)
        after_dummy = arithmetic.layer_weights(llm)
    for path, weight in fresh.items():
        assert torch.equal(again[path], weight)
        assert torch.equal(after_dummy[path], weight)


def test_a_view_outlives_its_tensor() -> None:
    """A reload keeps what loaders give it, which may be a part of a tensor that nobody else holds."""
    stream = HandedOut()
    tensor = torch.arange(8).view(4, 2)
    stream.note(tensor)
    part, copy = tensor[1:3], tensor.clone()
    del tensor
    assert stream.came_as_it_was(part)
    assert not stream.came_as_it_was(copy)
    del part
    stream.note(copy)
    assert stream.came_as_it_was(copy.t())
