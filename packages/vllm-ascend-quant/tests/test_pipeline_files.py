"""What a rank of a pipeline reads: not the files that hold other ranks' layers only, and no values of those."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.model_loader import default_loader

from vllm_ascend_quant.loading import stream

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
FOLDER = DATA / "checkpoints" / "msmodelslim" / "qwen3" / "W8A8_DYNAMIC_SHARDED"


def test_files_of_other_ranks_are_not_read(load_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three layers this rank has the first; the second file of four holds parts of the other two only."""
    monkeypatch.setattr("vllm.distributed.utils.get_pp_indices", lambda *_: (0, 1))
    read: list[str] = []
    judged: list[str] = []
    iterate, check = default_loader.safetensors_weights_iterator, stream.check_finite

    def noted(files: list[str], *args: Any, **kwargs: Any) -> Any:
        read.extend(Path(file).name for file in files)
        return iterate(files, *args, **kwargs)

    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", noted)
    monkeypatch.setattr(stream, "check_finite", lambda name, *rest: judged.append(name) or check(name, *rest))
    with load_model(FOLDER) as model:
        assert sum("q_norm" in name for name, _ in model.named_parameters()) == 1
    every = sorted(file.name for file in FOLDER.glob("*.safetensors"))
    older = not hasattr(default_loader, "filter_safetensors_files_by_weight_name")  # vLLM up to 0.28 reads all
    assert sorted(read) == (every if older else [every[0], *every[2:]])
    assert {name.partition("layers.")[2][:1] for name in judged if "layers." in name} == {"0"}
    assert "lm_head.weight" in judged
