"""The experts of real checkpoints, layer by layer, against the formulas of docs/formats/modelslim.md in float64."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core import DOWN, GATE_UP, AscendMoEScheme, CheckpointFolder, ExpertSizes, LayerQuery, QuantError
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import replace_parameter
from quant_core.schemes.verify import linear_params
from quant_modelslim import ModelSlimFormat

DATA = Path(os.environ.get("ASCEND_QUANT_TEST_DATA") or Path(__file__).parents[3] / "testdata")
MSMODELSLIM = DATA / "checkpoints" / "msmodelslim"
MEMBERS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}

Array = NDArray[np.float64]


def described(folder: Path) -> dict[str, str]:
    (file,) = folder.glob("quant_model_description*.json")
    return {k: v for k, v in json.loads(file.read_text()).items() if ".experts." in k and k.endswith(".weight")}


def folders() -> list[Path]:
    """Those whose experts are integers, but for the one whose attention is quantised too."""
    found = [p for model in ("qwen3-moe", "deepseek-v3") for p in sorted((MSMODELSLIM / model).glob("*"))]
    return [p for p in found if "FAKQUANT" not in p.name and not any("FP" in t for t in described(p).values())]


def weight_of(tensors: dict[str, Tensor], module: str, shape: tuple[int, int]) -> Array:
    """(q - offset) · scale of either stage, [out, in]; pairs of int4 lie along the output or input features."""
    stored = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.")}
    codes = stored["weight"].numpy().astype(np.int64)
    if codes.size * 2 == shape[0] * shape[1]:
        axis = 1 if codes.shape[0] * 2 == shape[0] else 2
        codes = np.stack([codes & 15, (codes >> 4) & 15], axis=axis).reshape(shape)
        codes = np.where(codes > 7, codes - 16, codes)
    assert codes.shape == shape
    values = codes.astype(np.float64)
    for suffix in ("_second", ""):
        if f"weight_scale{suffix}" in stored:
            scale = stored[f"weight_scale{suffix}"].double().numpy()
            offset = stored[f"weight_offset{suffix}"].double().numpy()
            width = shape[1] // scale.shape[1]
            values = (values - np.repeat(offset, width, 1)) * np.repeat(scale, width, 1)
    return values


def product(x: Array, weight: Array, quant_type: str) -> Array:
    if quant_type.endswith("A16"):
        return x @ weight.T
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / scale) @ weight.T * scale


def test_there_are_some() -> None:
    assert folders()


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_layer_computes_what_is_stored(folder: Path) -> None:
    opened, tensors = ModelSlimFormat.load(CheckpointFolder(folder)), {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    types = described(folder)
    prefix = next(iter(types)).partition(".experts.")[0] + ".experts"
    count = 1 + max(int(key.partition(".experts.")[2].partition(".")[0]) for key in types if key.startswith(prefix))
    config = json.loads((folder / "config.json").read_text())
    hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
    names = {h: tuple(tuple(f"{prefix}.{e}.{m}" for m in own) for e in range(count)) for h, own in MEMBERS.items()}
    query = LayerQuery(
        prefix, "moe", experts=names, sizes=ExpertSizes(hidden, intermediate, count), params_dtype=torch.float32
    )
    scheme = opened.create_scheme_for_layer(query)
    assert isinstance(scheme, AscendMoEScheme)
    layer = filled(scheme, opened, tensors)
    torch.manual_seed(0)
    x, weights = torch.randn(7, hidden), torch.rand(7, 2)
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(7)]).to(torch.int32)
    actual = scheme.apply(layer, x, weights, ids).double().numpy()
    wanted = np.zeros((7, hidden))
    for token in range(7):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            row = x[token : token + 1].double().numpy()
            gate, up = (
                product(row, weight_of(tensors, m, (intermediate, hidden)), types[f"{m}.weight"])
                for m in names[GATE_UP][expert]
            )
            (down,) = names[DOWN][expert]
            hidden_state = gate / (1 + np.exp(-gate)) * up
            wanted[token] += (
                weight
                * product(hidden_state, weight_of(tensors, down, (hidden, intermediate)), types[f"{down}.weight"])[0]
            )
    error, size = np.abs(actual - wanted), np.abs(wanted).max()
    assert np.median(error) < 1e-6 * size
    assert error.max() < 1e-2 * size  # one rounding decision of a hidden state


def filled(scheme: AscendMoEScheme, opened: ModelSlimFormat, tensors: dict[str, Tensor]) -> nn.Module:
    """A layer as an engine fills it: stored tensors under canonical names."""
    canonical = {opened.canonical_name(name): tensor for name, tensor in tensors.items()}
    layer = nn.Module()
    for prefix, half in scheme.halves.items():
        for suffix, layout in layouts_of(linear_params(half), half.context).items():
            value = torch.empty(layout.shape, dtype=layout.param.dtype)
            for expert, modules in enumerate(half.context.stack):
                for member, module in enumerate(modules):
                    layout.part(value, member, expert).copy_(canonical[f"{module}.{suffix}"])
            replace_parameter(layer, f"{prefix}{suffix}", value)
    scheme.process_weights_after_loading(layer)
    return layer


def test_experts_that_no_file_holds() -> None:
    (folder, *_) = folders()
    opened = ModelSlimFormat.load(CheckpointFolder(folder))
    names: dict[str, Any] = {half: ((f"nowhere.experts.0.{m}" for m in own),) for half, own in MEMBERS.items()}
    with pytest.raises(QuantError, match=r"nowhere\.experts\.0\.gate_proj"):
        opened.experts_quant(
            LayerQuery("nowhere.experts", "moe", experts={h: (tuple(n),) for h, (n,) in names.items()})
        )
