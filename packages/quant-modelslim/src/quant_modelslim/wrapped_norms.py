"""Norms that msModelSlim's oldest writer stores twice.

Its anti-outlier methods (m1, m2, m4) put a norm into a module with a weight and a bias of its own, and that writer
stores both: `<norm>.weight` and `<norm>.bias`, and once more `<norm>.module.weight` and `<norm>.module.bias`, described
as of the model's type. A model has one norm there, so the second pair is left out; but it has to be a copy.
"""

from collections.abc import Iterator

import torch

from quant_core import CheckpointError, CheckpointFolder, Finding, StoredForm

_INSIDE = ".module"


def is_wrapped_norm(form: StoredForm, folder: CheckpointFolder) -> bool:
    """Whether a module of the files is what such a norm stores a second time."""
    if not form.module.endswith(_INSIDE):
        return False
    own = folder.modules.get(form.module.removesuffix(_INSIDE))
    if own is None or not form.tensors.keys() <= {"weight", "bias"}:
        return False
    vectors = all(len(tensor.shape) == 1 and tensor.dtype.is_floating_point for tensor in form.tensors.values())
    return vectors and all(own.shape(suffix, ()) == tensor.shape for suffix, tensor in form.tensors.items())


def contradictions(folder: CheckpointFolder) -> Iterator[Finding]:
    """The tensors of such norms that are no copies: for which of the two the layers behind were made is not told."""
    pairs = [
        (folder.modules[form.module.removesuffix(_INSIDE)].tensors[suffix], tensor)
        for form in folder.modules.values()
        if is_wrapped_norm(form, folder)
        for suffix, tensor in form.tensors.items()
    ]
    if not pairs or not folder.weight_files:
        return  # without weights it is a saved state, which was compared when it was a checkpoint
    values = folder.read_tensors(tensor.name for pair in pairs for tensor in pair)
    for own, inside in pairs:
        if not torch.equal(values[own.name].double(), values[inside.name].double()):
            yield Finding(
                "norms that are stored twice differ, and nothing tells for which of them the layers behind were made",
                where=str(folder.path),
                found=f"{own.name} in {own.file} and {inside.name} in {inside.file}",
                expected="the same values under both names",
                todo="remove one of the two, with its keys, if you know which one belongs to the weights; otherwise "
                "quantise the model again with a newer msModelSlim",
                tensor=inside.name,
                error=CheckpointError,
            )
