"""Layers whose weight a model's own code reads, instead of calling the layer.

A quantised weight has another dtype, shape and meaning than a float one. Some models take theirs for what a float layer
has: they convolve with it, cast to its dtype, cut it and fuse the parts. Three of these are served: the dtype that is
asked for while a model is built or loaded (methods/parameter.py), ties (tying.py), and latent attention
(plugin/wrappers.py). Whatever else a model's source reads is found in the source, and such a layer is refused by name.
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quant_core import LimitError
from vllm_ascend_quant.methods.linear import AscendLinearMethod

#: What may be asked of any weight.
_HARMLESS = {"device", "weight_loader", "is_meta", "is_cuda", "is_cpu", "requires_grad"}
_HARMLESS_CALLS = {"isinstance", "hasattr", "getattr", "setattr", "delattr", "set_weight_attrs"}

#: Methods that run before there are values to read, or never where a model is served.
_BEFORE_LOADING = {"__init__", "_init_weights", "init_weights", "initialize_weights", "reset_parameters"}

#: Conditions under which code runs on other machines than ours.
_ELSEWHERE = re.compile(r"is_(rocm|cuda|cuda_alike|xpu)\(\)")

_READ = re.compile(r"\.(\w+)(?:\[[^\]]*\])?\.weight\b")


@dataclass(frozen=True)
class Read:
    """A place that reads `<something>.<layer>.weight`.

    Attributes:
        layer: the attributes that lead to the layer, the last of which holds it.
        of: the class whose `self` holds it; None where it is held by something else.
        line: its number.
        code: the line.

    """

    layer: tuple[str, ...]
    of: str | None
    line: int
    code: str


def refuse_what_is_read(model: nn.Module) -> None:
    """Refuse quantised layers whose weight the model's code reads.

    Raises:
        LimitError: names layer and code.

    """
    sources: dict[str, str] = {}  # the files of all classes of the model
    for module in model.modules():
        for cls in _classes(module):
            sources.setdefault(cls.__name__, _file(cls))
    for path, layer in model.named_modules(remove_duplicate=False):
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, AscendLinearMethod) or method.read_back:
            continue
        names = tuple(name for name in path.split(".") if not name.isdigit())  # as code goes through a list
        own = {cls.__name__ for cls in _classes(_holder(model, path))}
        for file in dict.fromkeys(sources.values()):
            for read in reads(file) if names[-1] in _candidates(file) else ():
                of_this = read.of is None or (read.of in own and sources[read.of] == file)
                if of_this and names[-len(read.layer) :] == read.layer:
                    raise LimitError(
                        f"{path} is {method.quant.quant_type}, and the model's code reads its weight as a float one",
                        where=f"{file}:{read.line}: {read.code}",
                        expected="a layer that is called only",
                        todo="leave this layer in float when quantising",
                    )


def _holder(model: nn.Module, path: str) -> nn.Module:
    """The module that holds a layer, itself or in a list."""
    while True:
        path = path.rpartition(".")[0]
        holder = model.get_submodule(path)
        if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)) or not path:
            return holder


def _classes(module: nn.Module) -> list[type]:
    return [
        cls for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins", "typing", "abc"))
    ]


@functools.cache
def _file(cls: type) -> str:
    try:
        return inspect.getsourcefile(cls) or ""
    except TypeError:  # made at run time
        return ""


@functools.cache
def _source(file: str) -> str:
    return Path(file).read_text(encoding="utf-8") if Path(file).is_file() else ""


@functools.cache
def _candidates(file: str) -> frozenset[str]:
    """Attributes whose weight may be read; found in a fraction of the time that a parser takes."""
    return frozenset(_READ.findall(_source(file)))


@functools.cache
def reads(file: str) -> tuple[Read, ...]:
    """The places in a source file that would get something else than a float weight."""
    lines = _source(file).splitlines()
    return tuple(
        Read(layer, of, node.lineno, lines[node.lineno - 1].strip())
        for node, layer, of in _weights(ast.parse(_source(file)), [])
    )


def _weights(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[ast.Attribute, tuple[str, ...], str | None]]:
    """Every harmful `<something>.<layer>.weight` with what leads to its layer, and the class if it is one of `self`."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and not _harmless(node, around):
        held, names = node.value, []
        while isinstance(held, (ast.Subscript, ast.Attribute)):
            names += [held.attr] if isinstance(held, ast.Attribute) else []
            held = held.value
        classes = [outer.name for outer in around if isinstance(outer, ast.ClassDef)]
        of_self = len(names) == 1 and isinstance(held, ast.Name) and held.id == "self"
        if names:
            yield node, tuple(reversed(names)), classes[-1] if of_self and classes else None
    for child in ast.iter_child_nodes(node):
        yield from _weights(child, [*around, node])


def _harmless(node: ast.Attribute, around: list[ast.AST]) -> bool:
    parent = around[-1]
    method = ""  # of the innermost class
    for outer in around:
        if isinstance(outer, ast.ClassDef):
            method = ""
        elif isinstance(outer, ast.FunctionDef):
            method = method or outer.name
    if method in _BEFORE_LOADING:
        return True
    if any(isinstance(outer, ast.If) and _ELSEWHERE.search(ast.unparse(outer.test)) for outer in around):
        return True
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS or (parent.attr == "dtype" and method == "load_weights")
    if isinstance(parent, ast.Call):
        called = ast.unparse(parent.func).rpartition(".")[2]
        return called in _HARMLESS_CALLS or called.endswith("weight_loader")
    # A tie: `head.weight = embedding.weight`.
    sides = [*parent.targets, parent.value] if isinstance(parent, ast.Assign) else []
    return bool(sides) and all(isinstance(side, ast.Attribute) and side.attr == "weight" for side in sides)
