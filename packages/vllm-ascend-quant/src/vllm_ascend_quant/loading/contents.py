"""Values that no sound checkpoint holds: what is not finite, and zeros where a model cannot have them.

An interrupted download into a file that was given its length before leaves zeros behind. Zeros are ordinary, too:
single rows (padding, dead channels), biases, offsets of symmetric types, gates, and norms that multiply by 1 + weight.
So what must not be all zeros is the weight of a linear layer, of an embedding and of an expert, and that of a norm
which the model makes of ones. The switch `zeros` is for a model that really has them, such as one with added identity
layers.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from quant_core import CheckpointError, CheckpointFolder, LoadError, QuantFormat
from quant_core.errors import listing
from quant_core.tails import zero_tail
from vllm_ascend_quant import compat
from vllm_ascend_quant.served_model import ServedModel
from vllm_ascend_quant.switches import DISABLE, enabled

#: Its name among what can be switched off.
ZEROS = "zeros"
_TODO = (
    "download the file again: an interrupted download leaves zeros; if the model really has them, start vLLM with the "
    f"environment variable {DISABLE}={ZEROS}"
)

#: What a float tensor may be stored in.
FLOAT_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

#: How names of tensors end that are zero in many models.
_MAY_BE_ZERO = ("bias", "offset", "zero_point")

#: Values that are looked at first; most weights are told by them.
_FIRST, _MOST = 1 << 10, 1 << 22


def check_finite(name: str, tensor: torch.Tensor, source: QuantFormat) -> None:
    """Refuse a float tensor with a value that is no number: the model would answer, and wrongly.

    Raises:
        LoadError: names the tensor and its file, and gives the first such value and where it is.

    """
    if tensor.dtype not in FLOAT_DTYPES or not tensor.numel():
        return
    if math.isfinite(sum(map(float, tensor.aminmax()))):  # NaN wins both; no mask of the tensor's size is made
        return
    finite = tensor.isfinite()
    position = (~finite).nonzero()[0].tolist()
    raise LoadError(
        f"{name} holds values that are not finite: {int((~finite).sum())} of {tensor.numel()}",
        where=_file(name, source),
        found=f"{float(tensor[tuple(position)])} at {position}",
        expected="finite numbers",
        todo="download the file again if it is damaged; otherwise quantise the model again",
    )


def never_zero(model: nn.Module, served: ServedModel) -> frozenset[str]:
    """The tensors, by canonical names, that are not zero from end to end in any sound model.

    Asked of a model that was built and not loaded yet: what its norms are made of tells what a zero means to them.
    """
    stored_at = served.paths.stored_at
    modules = {module for quant in served.layers.values() for module in quant.modules}
    experts = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, compat.expert_layer_class()):
            experts.add(compat.expert_prefix(module, path))
        elif path not in served.layers and _made_of_ones(module):
            modules.update(stored_at.get(path, ()))
    for below in served.paths.below(experts).values():
        modules.update(below)
    stacks = {module for path in experts for module in stored_at.get(path, ()) if module in served.modules}
    return frozenset(
        {f"{module}.weight" for module in modules}
        | {
            f"{module}.{suffix}"
            for module in stacks
            for suffix, tensor in served.modules[module].tensors.items()
            if len(tensor.shape) > 2 and not suffix.endswith(_MAY_BE_ZERO)
        }
    )


def check_not_zero(name: str, tensor: torch.Tensor, source: QuantFormat) -> None:
    """Refuse a weight if all of it, or one expert of a stack of them, is zero.

    Raises:
        LoadError: names the tensor and its file.

    """
    if not enabled(ZEROS):
        return
    for index, part in enumerate(tensor) if tensor.dim() > 2 else [(None, tensor)]:
        if part.dim() and len(part) > 1 and _all_zero(part):
            raise LoadError(
                f"{name if index is None else f'{name}[{index}]'} holds nothing but zeros",
                where=_file(name, source),
                found=f"zeros in all of {str(part.dtype).removeprefix('torch.')} {list(part.shape)}",
                expected="a weight; single rows may be zero",
                todo=_TODO,
            )


def check_tails(folder: CheckpointFolder) -> None:
    """Refuse weight files whose last tensors, several of them, are nothing but zeros.

    Raises:
        CheckpointError: names file, position and tensors.

    """
    if not enabled(ZEROS):
        return
    for file in sorted({tensor.file for tensor in folder.tensors.values()}):  # whose headers were read and are sound
        start, names = zero_tail(folder.path / file)
        if len(names) > 1 and not all(name.endswith(_MAY_BE_ZERO) for name in names):
            size = (folder.path / file).stat().st_size
            raise CheckpointError(
                f"{file} ends in zeros: its last {len(names)} tensors hold nothing else",
                where=folder.path / file,
                found=f"zeros from byte {start} to the end at {size}: {listing(names)}",
                todo=_TODO,
            )


def _made_of_ones(module: nn.Module) -> bool:
    """Whether a module has the weight of a norm that multiplies by it, as the model makes it before loading."""
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or weight.numel() < 2:
        return False
    return bool(weight.reshape(-1)[0] == 1) and bool((weight == 1).all())


def _all_zero(tensor: torch.Tensor) -> bool:
    values = tensor.reshape(-1)
    if values.is_floating_point() and values.itemsize == 1:
        values = values.view(torch.uint8)
    return not any(bool(part.any()) for part in _parts(values))


def _parts(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Ever longer parts: the first tells nearly always."""
    start, length = 0, _FIRST
    while start < len(values):
        yield values[start : start + length]
        start, length = start + length, min(4 * length, _MOST)


def _file(name: str, source: QuantFormat) -> object:
    stored = source.folder.tensors.get(name)
    return source.folder.path if stored is None else stored.file
