"""Quantised experts: the one way from tokens to tokens, of which types fill in how a half is multiplied."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quant_core.devices import current_device
from quant_core.schemes.activations import activate, unknown_activation
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.context import DOWN, GATE_UP, ExpertsContext, LayerContext
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.params import Param, tensor_of
from quant_core.schemes.routing import KNOWS_ABSENT, Codes, Rows, local_table, route_in, route_out
from quant_core.schemes.stacks import each_alone, put, stacked, take
from quant_core.schemes.verify import linear_params

#: Under this suffix a layer holds a list of weights that were packed one by one, in the place of a stack.
PACKED = "packed"


class AscendMoEScheme(Scheme):
    """A layer of routed experts: y = Σ over a token's k experts of weight · down(act(gate x) * (up x)).

    What is stored for a projection of one expert is what the linear scheme of the type stores. All experts of a half
    are a stack of such layers: declared, cut, filled, compared and processed as one of them is, under parameters with
    the prefixes `w13_` (gate above up) and `w2_` (down). A type says how a half is multiplied, and is then complete.

    Attributes:
        linear: the scheme of a linear layer that stores what one projection stores.
        before_routing: whether the input of the first half is quantised once per token, before a row is made for each
            of its experts; a type whose experts have input scales of their own cannot.
        halves: the linear scheme of each half that the instance serves.

    """

    linear: ClassVar[type[AscendLinearScheme]]
    before_routing: ClassVar[bool] = True
    context: ExpertsContext
    halves: Mapping[str, AscendLinearScheme]

    @classmethod
    def create(cls, context: LayerContext) -> Self:
        """An instance for one layer, with a linear scheme for each half."""
        scheme = super().create(context)
        scheme.halves = {prefix: cls.linear.create(half) for prefix, half in scheme.context.halves.items()}
        return scheme

    @classmethod
    def can_serve(cls, context: LayerContext) -> list[str]:
        """The device's reasons, those of the linear scheme, and the activation's."""
        assert isinstance(context, ExpertsContext)
        reasons = super().can_serve(context)
        for half in context.halves.values():
            reasons += cls.linear.can_serve(half)
            if half.form.transforms:
                reasons.append(f"experts have no transforms ({', '.join(half.form.transforms)})")
        activation = unknown_activation(context.sizes)
        return list(dict.fromkeys([*reasons, *([activation] if activation else [])]))

    def get_weight(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_size: int, params_dtype: torch.dtype
    ) -> dict[str, Param]:
        """`w13_weight` and `w2_weight`, experts first, for this rank."""
        return {name: param for name, param in self._declared().items() if name.endswith("_weight")}

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate_size_per_partition: int, hidden_size: int, params_dtype: torch.dtype
    ) -> dict[str, Param]:
        """Scales and all else that is stored beside the weights, experts first, for this rank."""
        return {name: param for name, param in self._declared().items() if not name.endswith("_weight")}

    def _declared(self) -> dict[str, Param]:
        return {
            f"{prefix}{name}": replace(layout.param, shape=layout.shape, output_dim=None, input_dim=None)
            for prefix, half in self.halves.items()
            for name, layout in layouts_of(linear_params(half), half.context).items()
        }

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Every projection as its linear scheme makes it, stacked."""
        for prefix, half in self.halves.items():
            modules = []
            for alone, module in each_alone(half, take(layer, prefix)):
                self.process_one(alone, module)
                modules.append(module)
            put(layer, prefix, stacked(modules))
        self._prepare_routing(layer)

    def _prepare_routing(self, layer: nn.Module) -> None:
        self._table = local_table(self.context.sizes, next(layer.parameters()).device)
        self._knows_absent = current_device() in KNOWS_ABSENT

    def process_one(self, linear: AscendLinearScheme, module: nn.Module) -> None:
        """Turn what is stored for one projection into the form that the grouped operators take."""
        linear.process_weights_after_loading(module)

    def apply(self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Tensor:
        """The weighted sum over the chosen experts that are on this rank.

        Args:
            layer: holds the processed parameters.
            x: [tokens, hidden].
            topk_weights: [tokens, k] float32.
            topk_ids: [tokens, k] global expert ids; those of other ranks, and negative ones, contribute nothing.
            **kwargs: what the engine adds.

        Returns:
            [tokens, hidden] in x's dtype, a tensor of its own.

        """
        if self.context.sizes.weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        rows, index = self.route(layer, x, topk_ids)
        return route_out(self.compute(layer, rows, x.dtype), index, topk_weights, self._knows_absent)

    def route(self, layer: nn.Module, x: Tensor, topk_ids: Tensor) -> tuple[Rows, Tensor]:
        """The rows of this rank's experts, and the row of each choice; see route_in.

        An engine that sends tokens between ranks makes them itself.
        """
        local = self.context.sizes.local_experts or range(self.context.sizes.num_experts)
        first, scale = self.of(GATE_UP), None
        if first.before_routing:
            x, scale = first.quantize_rows(layer, GATE_UP, x, None)
        return route_in(x, scale, topk_ids, self._table, len(local))

    def compute(self, layer: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Both products and what lies between them.

        Args:
            layer: holds the processed parameters.
            rows: as `route` makes them.
            dtype: the model's.

        Returns:
            [m, hidden], row by row.

        """
        first, second, counts = self.of(GATE_UP), self.of(DOWN), rows.counts
        if not first.before_routing:
            rows = Rows(*first.quantize_rows(layer, GATE_UP, rows.values, counts), counts)
        hidden = activate(first.multiply(layer, GATE_UP, rows, dtype), self.context.sizes)
        return second.multiply(layer, DOWN, Rows(*second.quantize_rows(layer, DOWN, hidden, counts), counts), dtype)

    @property
    def sends_int8(self) -> bool:
        """Whether `compute` takes rows that npu_dynamic_quant made, so that an engine may send them in that form."""
        return False

    def compute_float(self, layer: nn.Module, x: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """As `compute`, of rows in float, which an engine has brought to their experts by itself.

        Args:
            layer: holds the processed parameters.
            x: [m, hidden], sorted by expert.
            counts: int64 [local experts], how many rows each expert has.
            dtype: the model's.

        """
        first = self.of(GATE_UP)
        codes = first.quantize_rows(layer, GATE_UP, x, None) if first.before_routing else (x, None)
        return self.compute(layer, Rows(*codes, counts), dtype)

    def of(self, half: str) -> "AscendMoEScheme":
        """The scheme of a half."""
        return self

    def quantize_rows(self, layer: nn.Module, half: str, x: Tensor, counts: Tensor | None) -> Codes:
        """What goes to the product of a half: codes and their scales, or rows as they are.

        Args:
            layer: holds the processed parameters.
            half: `w13_` or `w2_`.
            x: [m, features].
            counts: int64 [local experts], how many rows each expert has; None before a row was made for each of them.

        """
        return x, None

    @abstractmethod
    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Rows of each expert times its weight: [m, outputs] in `dtype`; arguments as those of `quantize_rows`."""


class MixedExperts(AscendMoEScheme):
    """Experts whose halves are of two types."""

    def __init__(self, context: ExpertsContext, schemes: Mapping[str, AscendMoEScheme]) -> None:
        self.context = context
        self.schemes = schemes
        self.halves = {prefix: scheme.halves[prefix] for prefix, scheme in schemes.items()}

    def of(self, half: str) -> AscendMoEScheme:
        """The scheme of a half."""
        return self.schemes[half]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Each scheme its half."""
        for scheme in self.schemes.values():
            scheme.process_weights_after_loading(layer)
        self._prepare_routing(layer)

    def multiply(self, layer: nn.Module, half: str, rows: Rows, dtype: torch.dtype) -> Tensor:
        """As the scheme of the half."""
        return self.schemes[half].multiply(layer, half, rows, dtype)


def weights_of(layer: nn.Module, half: str) -> list[Tensor]:
    """The weights of a half as the operators take them: one tensor of all experts, or a packed one of each."""
    packed: list[Tensor] | None = getattr(layer, f"{half}{PACKED}", None)
    return [tensor_of(layer, f"{half}weight")] if packed is None else packed


def grouped(layer: nn.Module, half: str, rows: Rows, **operands: Any) -> Tensor:
    """npu_grouped_matmul of rows and the stacked weight of a half.

    Args:
        layer: holds the weight.
        half: `w13_` or `w2_`.
        rows: with how many each expert has.
        **operands: of the operator; a suffix stands for the parameter of that name.

    """
    lists = {
        name: [tensor_of(layer, f"{half}{value}")] if isinstance(value, str) else value
        for name, value in operands.items()
    }
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [rows.values],
        weights_of(layer, half),
        per_token_scale=None if rows.scale is None else [rows.scale],
        group_list=rows.counts,
        group_list_type=1,
        group_type=0,
        split_item=2,
        **lists,
    )
    return y  # type: ignore[no-any-return]
