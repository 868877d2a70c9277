"""Comparing what a scheme declares with what the files hold, and with what was loaded.

Both are asked by whoever wires schemes into an engine; a scheme itself only declares. A layer may be fused from several
modules, and be one of a stack.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from quant_core.errors import Finding, LoadError, raise_findings
from quant_core.schemes.base import AscendLinearScheme
from quant_core.schemes.params import Param, same_kind
from quant_core.stored import StoredForm

#: Stored beside a quantised weight, but owned by the layer and not by the scheme.
LAYER_OWNED = frozenset({"bias"})


def linear_params(scheme: AscendLinearScheme) -> dict[str, tuple[Param, ...]]:
    """The declarations of what is loaded for every member of a linear layer, by suffix.

    Raises:
        LoadError: if the members of a fused layer store different things.

    """
    form = scheme.context.form
    return {name: params for name, params in _declared(scheme).items() if not _lacks(form, name, params[0])}


def absent_params(scheme: AscendLinearScheme) -> dict[str, tuple[Param, ...]]:
    """Plain declarations (`Param.plain`) of what the files lack, which the scheme is handed as zeros."""
    form = scheme.context.form
    return {name: params for name, params in _declared(scheme).items() if _lacks(form, name, params[0])}


def _lacks(form: StoredForm, name: str, param: Param) -> bool:
    return bool(form) and param.plain and not form.has(name)


def _declared(scheme: AscendLinearScheme) -> dict[str, tuple[Param, ...]]:
    context = scheme.context
    members = [scheme.params(context.input_size, shard.output_size) for shard in context.shards]
    names = dict.fromkeys(name for member in members for name in member)
    declared = {name: [member.get(name) for member in members] for name in names}
    same: dict[str, tuple[Param, ...]] = {}
    for name, params in declared.items():
        stored = tuple(param for param in params if param is not None)
        if len(stored) < len(params) or not same_kind(stored):
            forms = [_form(p.shape, p.dtype) if p is not None else "nothing" for p in params]
            raise LoadError(
                f"{context.name}: the members of this fused layer store {name} in different forms",
                found="; ".join(f"{s.name}: {form}" for s, form in zip(context.shards, forms, strict=True)),
                expected="one dtype and granularity",
                todo="quantise the members alike",
            )
        same[name] = stored
    return same


def verify_stored(scheme: AscendLinearScheme) -> None:
    """Compare each member's files with the declarations; nothing to do while there are no files.

    Raises:
        LoadError: lists every tensor that is absent, unexpected, or of another shape or dtype.

    """
    context = scheme.context
    linear_params(scheme)
    forms = {form.module: form for form in context.stored} if any(context.stored) else {}
    sizes = _member_sizes(scheme)
    files = ", ".join(sorted({t.file for form in forms.values() for t in form.tensors.values()}))
    findings = []
    sound: set[Any] = set()  # experts are thousands of equal modules: one of each kind tells
    for module, form in forms.items():
        rows = _rows(form, sizes.get(module, []))
        kind = (rows, *((suffix, tensor.shape, tensor.dtype) for suffix, tensor in form.tensors.items()))
        if kind in sound:
            continue
        problems = [*stored_problems(form, scheme.params(context.input_size, rows)), *_bias_problems(form, rows)]
        if not problems:
            sound.add(kind)
        findings += [
            Finding(
                f"{context.name}: the files do not hold what the scheme {type(scheme).__name__} loads",
                where=files,
                found=problem,
                todo="check that description, config.json and weights belong together; otherwise quantise the model "
                "again",
                layer=context.name,
                tensor=tensor,
                file=form.tensors[suffix].file if suffix in form.tensors else None,
                error=LoadError,
            )
            for suffix, tensor, problem in problems
        ]
    raise_findings(findings)


#: A canonical suffix, the tensor's name, and what is wrong with it.
Problem = tuple[str, str, str]


def _member_sizes(scheme: AscendLinearScheme) -> dict[str, list[int]]:
    """The output sizes of the members that are cut from each module; one module may be the source of several."""
    sizes: dict[str, list[int]] = {}
    for modules in scheme.context.modules:
        for module, shard in zip(modules, scheme.context.shards, strict=True):
            sizes.setdefault(module, []).append(shard.output_size)
    return sizes


def stored_problems(form: StoredForm, declared: dict[str, Param]) -> Iterable[Problem]:
    """What differs between one module's tensors and the declarations."""
    for suffix, param in declared.items():
        tensor = form.tensors.get(suffix)
        if tensor is None:
            if not param.plain:
                name = form.name_of(suffix)
                yield suffix, name, f"{name} is absent, expected {_form(param.shape, param.dtype)}"
        elif tensor.shape != param.shape or not param.takes(tensor.dtype):
            found, expected = _form(tensor.shape, tensor.dtype), _form(param.shape, param.dtype)
            yield suffix, tensor.name, f"{tensor.name} in {tensor.file} is {found}, expected {expected}"
    for suffix in sorted(form.tensors.keys() - declared.keys() - LAYER_OWNED):
        tensor = form.tensors[suffix]
        unused = "is not used by this type, and dropping it would change the results"
        yield suffix, tensor.name, f"{tensor.name} in {tensor.file} {unused}"


def _rows(form: StoredForm, sizes: list[int]) -> int:
    """The rows that a module must have which is the source of members of these sizes.

    It is cut into them, or, if it has the rows of each of them, loaded into each (a model that uses k as v).
    """
    stored = form.sizes()
    return sizes[0] if stored is not None and set(sizes) == {stored[1]} else sum(sizes)


def _bias_problems(form: StoredForm, rows: int) -> Iterable[Problem]:
    tensor = form.tensors.get("bias")
    if tensor is None or (tensor.shape == (rows,) and form.float_dtype("bias") == tensor.dtype):
        return
    found = _form(tensor.shape, tensor.dtype)
    yield "bias", tensor.name, f"{tensor.name} in {tensor.file} is {found}, expected {[rows]} of a float dtype"


def check_values(layer: str, names: Sequence[str], param: Param, loaded: torch.Tensor) -> None:
    """Judge loaded values by the declaration's own check.

    Args:
        layer: the layer's name, for messages.
        names: the stored tensors that were loaded.
        param: their declaration.
        loaded: the values.

    Raises:
        LoadError: names the tensors, how many values are wrong and one of them.

    """
    complaint = param.check(loaded) if param.check is not None else None
    if complaint:
        suffix = names[0].rpartition(".")[2]
        raise LoadError(
            f"{layer}: {suffix} cannot be used",
            where=", ".join(dict.fromkeys(names)),
            found=complaint,
            todo="the checkpoint is damaged or was written by a failed calibration: quantise the model again",
        )


def _form(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
