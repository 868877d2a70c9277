"""The stream of tensors that a model loads: the one place where it passes, at the first load and at every reload."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from quant_core import LimitError, QuantError, QuantFormat
from vllm_ascend_quant import compat
from vllm_ascend_quant.loading.contents import check_finite, check_not_zero, never_zero
from vllm_ascend_quant.loading.explaining import called_directly, stopped
from vllm_ascend_quant.loading.floats import check_rows
from vllm_ascend_quant.loading.source import check_source
from vllm_ascend_quant.methods.linear import AscendLinearMethod
from vllm_ascend_quant.methods.parameter import AscendParameter, dtype_of_the_model
from vllm_ascend_quant.methods.rows import handed_out
from vllm_ascend_quant.placement.paths import beside_weight
from vllm_ascend_quant.served_model import ServedModel


def watch_loading(model: nn.Module, served: ServedModel) -> None:
    """From now on, take note of what the model's `load_weights` is given and reports.

    Whatever it raises becomes an error that names the tensor. Files that hold nothing of this rank are not read.

    Raises:
        LoadError: if float tensors would not fit.

    """
    original: Any = model.load_weights
    started = served.model_config.model
    weighty = never_zero(model, served)
    reference = weakref.ref(model)  # the function becomes an attribute of the model

    @functools.wraps(original)
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        last: list[tuple[str, torch.Tensor]] = []
        loaded_model = reference()
        assert loaded_model is not None, "its own method is running"
        loading = served.loading
        if loading.processed and not compat.is_reloading(loaded_model):
            raise called_directly(served.format)
        other = None
        try:
            other = check_source(served, started)
            if other is not None:
                check_rows(loaded_model, served, other)
            stream = _canonical(weights, loaded_model, served, other or served.format, weighty, last)
            with dtype_of_the_model(served.model_config.dtype):
                reported = original(_after(lambda: check_late_heads(loaded_model), stream), *args, **kwargs)
        except Exception as error:
            failed, source = served.model_config.model, other or served.format
            give_up(loaded_model, served)
            if isinstance(error, (QuantError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise stopped(served.format, source if loading.processed else None, failed, last, error) from error
        finally:
            handed_out.forget()
        loading.called = True
        loading.reported = None if reported is None else (loading.reported or set()) | set(reported)
        return reported

    model.load_weights = load_weights  # type: ignore[assignment]
    if served.elsewhere:
        compat.leave_unread(model, served.elsewhere)
    if not served.made_up:
        check_rows(model, served, served.format)


def _after(check: Callable[[], None], stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A stream whose first tensor comes after a check."""
    check()
    yield from stream


def check_late_heads(model: nn.Module) -> None:
    """Refuse what a model makes while it loads, and ties to a quantised embedding.

    vLLM's rerankers make a head of which they take single rows, as if they were float.

    Raises:
        LimitError: names the head.

    """
    for path, module in model.named_modules():
        late = isinstance(module, VocabParallelEmbedding) and not isinstance(module.quant_method, AscendLinearMethod)
        if late and isinstance(module._parameters.get("weight"), AscendParameter):
            raise LimitError(
                f"{path}: the model makes it while loading, to read rows of an embedding that is quantised",
                expected="a float embedding, or a classifier of its own (score.weight) in the files",
                todo="leave the embedding in float",
            )


def _canonical(
    weights: Iterable[tuple[str, torch.Tensor]],
    model: nn.Module,
    served: ServedModel,
    quant_format: QuantFormat,
    weighty: frozenset[str],
    last: list[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream under canonical names, without what no layer needs; `last` holds what came last, as it came.

    Where a loader rearranged the rows of a weight, numbers of its rows follow under the same name.
    """
    # Their tensors are checked by what they mean.
    quantised = {module for quant in served.layers.values() if quant.quant_type is not None for module in quant.modules}
    for name, tensor in weights:
        last[:] = [(name, tensor)]
        if name.partition(".")[0] in served.drafts_only:
            continue
        served.loading.came.add(name)
        if name in served.cache_tensors:
            parameter: Any = model.get_parameter(served.cache_tensors[name])
            parameter.weight_loader(parameter, tensor)
            continue
        canonical = quant_format.canonical_name(name)
        if canonical is not None:
            module = name.rpartition(".")[0]
            if module in quantised:
                canonical = beside_weight(model, canonical)
            elif module not in served.elsewhere:  # whoever holds it checks it
                check_finite(name, tensor, quant_format)
            if canonical in weighty and module not in served.elsewhere:
                check_not_zero(name, tensor, quant_format)
            handed_out.note(tensor)
            yield canonical, tensor
            question = handed_out.question(tensor)
            if question is not None:
                yield canonical, question


def give_up(model: nn.Module, served: ServedModel) -> None:
    """Leave no half-done reload behind: the next one would count its tensors to this one's, or look into its folder."""
    served.model_config.model = served.loading.held
    for param in model.parameters():
        if isinstance(param, AscendParameter):
            param.begin_again()
    compat.abandon_reload(model)
