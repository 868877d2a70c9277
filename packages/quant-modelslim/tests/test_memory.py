"""The bytes that schemes declare are those of the files."""

import math
import os
from pathlib import Path

import pytest

from quant_core import CheckpointFolder, LayerQuery
from quant_core.memory import stored_bytes
from quant_modelslim import ModelSlimFormat

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
FOLDERS = [file.parent for file in sorted((DATA / "checkpoints" / "msmodelslim").glob("*/*/config.json"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_module_takes_what_its_tensors_take(folder: Path) -> None:
    found = ModelSlimFormat.load(CheckpointFolder(folder))
    counted = 0
    for module, form in found.modules.items():
        if not form.has("weight"):
            continue
        query = LayerQuery(module, modules=(module,))
        if found.layer_quant(query).quant_type is None:
            continue
        scheme = found.create_scheme_for_layer(query)
        assert scheme is not None
        expected = sum(math.prod(t.shape) * t.dtype.itemsize for suffix, t in form.tensors.items() if suffix != "bias")
        assert stored_bytes(scheme) == expected, module
        counted += 1
    assert counted
