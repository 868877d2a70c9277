"""FlatQuant checkpoints that must not be served, in real vLLM: matrices that differ, and a cut through a transform."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quant_core import LoadError

sys.path.insert(0, str(Path(__file__).parent))  # for the helper beside this file
import ranks

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or REPOSITORY / "testdata")
KEY = "msmodelslim/qwen3/W4A4_FLATQUANT_DYNAMIC"


@pytest.mark.parametrize("name", ["left_trans", "right_trans"])
def test_fused_members_must_store_the_same_matrices(
    name: str, checkpoint: Callable[[str], Path], load_model: Callable[..., Any]
) -> None:
    """Each may have a clip ratio of its own, but all see one transformed input."""
    folder = checkpoint(KEY)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"model.layers.1.self_attn.k_proj.{name}"][0, 0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=f"members of this fused layer must store the same {name}") as raised:  # noqa: SIM117
        with load_model(folder):
            pass
    assert f"model.layers.1.self_attn.k_proj.{name}" in str(raised.value)


@pytest.mark.xdist_group("engines of several processes")
def test_a_transform_is_not_cut() -> None:
    """o_proj and down_proj are row-parallel, and their matrices mix the features of all ranks."""
    printed = ranks.Engine(DATA / "checkpoints" / KEY, [[1, 2]], tensor_parallel_size=2).output()
    assert "self_attn.o_proj" in printed
    assert "left_trans mixes input features of all 2 tensor-parallel ranks: use tensor_parallel_size 1" in printed
