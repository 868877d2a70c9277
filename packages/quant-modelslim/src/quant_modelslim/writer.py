"""Writing a ModelSlim checkpoint by the plain rule of types that need no calibration.

Meant for tests and experiments: msModelSlim calibrates, smooths and rotates, this does not.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core import (
    AscendLinearScheme,
    LayerQuant,
    LayerQuery,
    LinearSizes,
    StoredForm,
    UnsupportedSchemeError,
    require_scheme_class,
)
from quant_core.judging import layer_context
from quant_modelslim.description import PATTERN, Description
from quant_modelslim.stating import stated
from quant_modelslim.type_names import FLOAT, PACKED_ALONG, TRANSFORMS

#: A module's name and weight to the type that it gets.
Choice = Callable[[str, Tensor], str]


def quantize_tensors(tensors: Mapping[str, Tensor], choose: Choice) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Quantise the weights that `choose` gives a type other than FLOAT.

    Args:
        tensors: a float model's tensors.
        choose: asked for every two-dimensional `<module>.weight`.

    Returns:
        the tensors of the checkpoint, and the type of each.

    Raises:
        UnsupportedSchemeError: if `choose` names a type that is not registered for linear layers.

    """
    stored: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        matrix = suffix == "weight" and tensor.dim() == 2
        quant_type = choose(module, tensor) if matrix else FLOAT
        parts = {suffix: tensor} if quant_type == FLOAT else quantize_weight(module, tensor, quant_type)
        for part, value in parts.items():
            key = f"{module}.{part}" if module else part
            stored[key] = value.contiguous()
            types[key] = quant_type
    return stored, types


def quantize_weight(module: str, weight: Tensor, quant_type: str) -> dict[str, Tensor]:
    """The stored tensors of one weight [out, in], by suffix."""
    if quant_type in TRANSFORMS:
        raise UnsupportedSchemeError(
            f"{module}: {quant_type} cannot be written by a plain rule",
            found=f"{', '.join(TRANSFORMS[quant_type])} beside the weight, which only calibration finds",
        )
    if PACKED_ALONG.get(quant_type) == 1 and weight.shape[1] % 2:
        raise UnsupportedSchemeError(
            f"{module}: {weight.shape[1]} input features cannot be written as {quant_type}",
            expected="an even number: a reader could not tell how they are packed",
        )
    scheme_class = require_scheme_class(quant_type, "linear", where=module)
    assert issubclass(scheme_class, AscendLinearScheme)
    out_features, in_features = weight.shape
    query = LayerQuery(module, sizes=LinearSizes(in_features, (out_features,)), params_dtype=torch.float32)
    form = stated(StoredForm(module), quant_type, Description("", {}), query)
    context = layer_context(query, LayerQuant(quant_type, (module,), (form,)), scheme_class)
    return scheme_class.create(context).quantize(weight)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], choose: Choice, files_from: Path | None = None
) -> None:
    """Write a folder as msModelSlim's newest saver does: one weights file and one description.

    Args:
        folder: made if absent.
        tensors: a float model's tensors.
        choose: see `quantize_tensors`.
        files_from: a folder whose config and tokenizer files are copied.

    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, types = quantize_tensors(tensors, choose)
    save_file(stored, folder / "quant_model_weights.safetensors", metadata={"format": "pt"})
    description = {
        **types,
        "version": "1.0.0",
        "model_quant_type": FLOAT,
        "group_size": 0,
        "metadata": {},
        "optional": {},
    }
    (folder / "quant_model_description.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    for file in files_from.iterdir() if files_from else ():
        of_weights = file.match("*.safetensors.index.json") or file.match(PATTERN)
        if file.suffix in {".json", ".txt", ".jinja", ".model"} and not of_weights:
            shutil.copyfile(file, folder / file.name)  # not its mode: the source may be read-only
