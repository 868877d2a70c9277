"""Every call that a scheme makes, against torch_npu's schemas and Meta kernels."""

from typing import Any

import pytest
import torch
from linear_forms import LAYERS, forms
from on_meta import on_meta, outline
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core.schemes.dequantised import DequantisedLinearScheme

FORMS = forms()


class Recorder(TorchDispatchMode):
    """Keeps the calls of torch_npu's operators: operator, arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "npu":
            self.calls.append((func, args, kwargs or {}, result))
        return result


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])  # a float32 model is ours, no device has it
@pytest.mark.parametrize("form", FORMS)
def test_torch_npu_takes_every_call_and_predicts_its_result(
    form: str, dtype: torch.dtype, layer: str, real: dict[str, Any]
) -> None:
    with Recorder() as recorder:
        outputs = FORMS[form].compute(dtype, **LAYERS[layer])
    assert {output.dtype for output in outputs} <= {dtype}
    # A dequantised weight is there because none of these operators multiplies what is stored.
    by_operators = bool(outputs) and not issubclass(FORMS[form].scheme_class, DequantisedLinearScheme)
    assert bool(recorder.calls) == by_operators
    for operator, arguments, options, result in recorder.calls:
        name = str(operator).removeprefix("npu.").removesuffix(".default")
        assert str(operator._schema) == real[name].schema
        positional, named = on_meta((arguments, options))
        assert outline(operator(*positional, **named)) == outline(result), f"torch_npu's Meta kernel of {name}"
