"""All registered linear schemes in the forms that we know: those of its cases, one drawn from what it declares."""

from dataclasses import dataclass
from typing import Any

import torch
from linear_cases import CASES, Case
from torch import Tensor
from workbench import Stored, Workbench

from quant_core import AscendLinearScheme, Partition, list_schemes
from quant_core.devices import planned_device
from quant_core.errors import LimitError
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.verify import linear_params

#: Options of the layer. max_over_ranks is what one of two equal ranks finds: with it a scheme quantises for *exact TP*.
LAYERS: dict[str, dict[str, Any]] = {
    "whole": {},
    "decode": {"role": "decode"},
    "row": {"partition": Partition("row", 0, 2)},
    "row, exact TP": {"partition": Partition("row", 0, 2, max_over_ranks=lambda values: values)},
}


@dataclass(frozen=True)
class Form:
    """A scheme and how its stored tensors are made."""

    scheme_class: type[AscendLinearScheme]
    case: Case | None = None

    def compute(self, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        """Everything that a layer of two members computes, from the processing of its weights on.

        Nothing if the layer is to be cut and the type refuses that, which is not said of any other layer.
        """
        bench, sizes, inputs = Workbench(), (128, 64), 1024
        members = self.members(sizes, inputs)
        context = bench.context(members, dtype, sizes=sizes, inputs=inputs, scheme_class=self.scheme_class, **options)
        refusals = self.scheme_class.can_serve(context)
        scheme = self.scheme_class.create(context)
        try:
            layouts_of(linear_params(scheme), context)
        except LimitError as error:
            refusals.append(str(error))
        if refusals and context.partition.size > 1:
            return []
        assert refusals == []
        layer = bench.load(scheme, members)
        with planned_device(self.case.device if self.case else "cpu"):
            scheme.process_weights_after_loading(layer)
        width = inputs // context.partition.input_parts
        bias = None if scheme.folds_bias else torch.randn(sum(sizes)).to(dtype)
        rows, batches = torch.randn(5, width).to(dtype), torch.randn(2, 3, width).to(dtype)
        return [scheme.apply(layer, rows, bias), scheme.apply(layer, batches)]

    def members(self, sizes: tuple[int, ...], inputs: int) -> list[Stored]:
        """Stored modules of these output sizes."""
        if self.case is not None:
            return list(self.case.members(sizes, inputs))
        return [Workbench().draw(self.scheme_class, size, inputs) for size in sizes]


def forms() -> dict[str, Form]:
    """All of them by name."""
    linear = {kind: cls for (kind, layer_type), cls in list_schemes().items() if layer_type == "linear"}
    drawn = {f"{kind} as declared": Form(cls) for kind, cls in linear.items()}
    return drawn | {name: Form(case.scheme, case) for name, case in CASES.items()}
