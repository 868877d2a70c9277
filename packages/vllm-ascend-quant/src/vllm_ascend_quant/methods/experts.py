"""Layers of routed experts."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from quant_core import (
    DOWN,
    GATE_UP,
    AscendMoEScheme,
    ExpertSizes,
    LayerQuant,
    LayerQuery,
    LimitError,
    LoadError,
    Partition,
    QuantFormat,
    create_scheme,
)
from quant_core.errors import listing
from quant_core.schemes.filling import Filling
from quant_core.schemes.handover import check_shared, hand_over
from quant_core.schemes.layouts import layouts_of
from quant_core.schemes.verify import absent_params, check_values, linear_params
from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.exact_tp import exact_tp_wanted, max_over_ranks
from vllm_ascend_quant.methods.expert_parameter import AscendExpertParameter
from vllm_ascend_quant.methods.linear import instance_role
from vllm_ascend_quant.placement.experts import ExpertModules

# vLLM's own values for an activation whose model gives none.
_SWIGLUOAI = {"limit": 7.0, "alpha": 1.702, "beta": 1.0}


class AscendFusedMoEMethod(FusedMoEMethodBase):
    """Turns a scheme's declarations for experts into vLLM parameters and delegates the rest.

    Attributes:
        format: the checkpoint, which makes the scheme.
        name: the layer's, for messages: vLLM's while the model is being built, then its path.
        quant: the format's answer about the layer.
        experts: the modules that it is loaded from.
        quant_method: the scheme, once the layer's sizes are known.
        made_up: whether the first weights are made up (`load_format="dummy"`), so that their values mean nothing.

    """

    def __init__(
        self,
        layer: nn.Module,
        quant_format: QuantFormat,
        name: str,
        experts: ExpertModules,
        quant: LayerQuant,
        made_up: bool,
    ):
        super().__init__(layer.moe_config)  # type: ignore[arg-type]
        self.format = quant_format
        self.name = name
        self.experts = experts
        self.quant = quant
        self.quant_method: AscendMoEScheme
        self.made_up = made_up
        self._choose = compat.expert_chooser()

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: what a modular kernel of vLLM would be told."""
        return

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        """As they are: a checkpoint is not padded."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the scheme, check it against limits and files, and register its parameters.

        Raises:
            QuantError: as quant_core.create_scheme, and for experts with biases, which no type stores.

        """
        config: Any = layer.moe_config
        if config.has_bias:
            raise LimitError(
                f"{self.name}: the experts of this model have biases, which no quantised type stores",
                todo="leave the experts in float",
            )
        exact = config.tp_size > 1 and exact_tp_wanted()
        query = LayerQuery(
            self.name,
            "moe",
            experts=self.experts,
            sizes=self._sizes(layer, hidden_size, intermediate_size_per_partition * config.tp_size),
            params_dtype=params_dtype,
            partition=Partition("row", config.tp_rank, config.tp_size, max_over_ranks if exact else None),
            role=instance_role(),
        )
        self.quant = self.format.experts_quant(query)
        scheme = create_scheme(query, self.quant)
        assert isinstance(scheme, AscendMoEScheme)
        self.quant_method = scheme
        compat.load_by_parameters(layer)
        places = {expert: place for place, expert in enumerate(query.sizes.local_experts)}  # type: ignore[union-attr]
        for prefix, half in scheme.halves.items():
            for name, layout in layouts_of(linear_params(half), half.context).items():
                filling = Filling(layout, half.context.name, half.context.modules)
                layer.register_parameter(
                    f"{prefix}{name}", AscendExpertParameter(filling, half.context.partition, places)
                )

    def _sizes(self, layer: nn.Module, hidden_size: int, intermediate_size: int) -> ExpertSizes:
        config: Any = layer.moe_config
        table = compat.expert_map(layer)
        held = range(config.num_experts)
        local = held if table is None else sorted((e for e in held if table[e] >= 0), key=lambda e: int(table[e]))
        activation = config.activation.value
        usual = _SWIGLUOAI if activation.startswith("swigluoai") else {}
        limits = usual | compat.swiglu_settings(config)
        return ExpertSizes(
            hidden_size,
            intermediate_size,
            config.num_experts,
            tuple(local),
            activation,
            weight_on_input=bool(layer.apply_router_weight_on_input),
            **limits,
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything was loaded and makes sense, then let the scheme build its run-time form.

        Raises:
            LoadError: names what was not loaded, or values that cannot be used.

        """
        stored = expert_parameters(layer)
        if not self.made_up or any(param.filling.filled for param in stored.values()):
            self._check(layer)
        else:
            for param in stored.values():
                compat.make_up(param)
        for param in stored.values():
            param.begin_again()
        for prefix, half in self.quant_method.halves.items():
            layouts = [p.filling.layout for name, p in stored.items() if name.startswith(prefix)]
            absent = layouts_of(absent_params(half), half.context)
            hand_over(layer, layouts, absent.values(), prefix)
        self.quant_method.process_weights_after_loading(layer)

    def missing(self, layer: nn.Module) -> list[str]:
        """The stored tensors that were not loaded since the layer was last processed."""
        return [
            f"{module}.{self._spelled(name)}"
            for name, param in expert_parameters(layer).items()
            for module in param.filling.missing()
        ]

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum over this rank's experts; vLLM adds shared experts and the other ranks' sums."""
        return self.quant_method.apply(layer, x, topk_weights, topk_ids)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM hands over the router's logits, and not the experts that it chose."""
        return self._choose is not None

    def apply_monolithic(
        self, layer: nn.Module, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same as `apply`, of experts that are chosen here."""
        assert self._choose is not None, "vLLM chooses them itself"
        return self.apply(layer, x, *self._choose(layer, x, router_logits))

    def _spelled(self, name: str) -> str:
        """A parameter's suffix as the checkpoint has it."""
        prefix = GATE_UP if name.startswith(GATE_UP) else DOWN
        suffix = name.removeprefix(prefix)
        return self.quant_method.halves[prefix].context.form.spelling.get(suffix, suffix)

    def _check(self, layer: nn.Module) -> None:
        missing = self.missing(layer)
        if missing:
            raise LoadError(
                f"{self.name}: {len(missing)} stored tensors of experts were never loaded: {listing(missing)}",
                where=listing(str(evidence) for evidence in self.quant.evidence),
                todo="the weights that were sent lack these tensors: check the files, or the iterator of a reload",
            )
        for name, param in expert_parameters(layer).items():
            prefix = GATE_UP if name.startswith(GATE_UP) else DOWN
            context, layout = self.quant_method.halves[prefix].context, param.filling.layout
            if layout.axis is None:
                check_shared(context, name.removeprefix(prefix), param.data)
            if layout.param.check is None or layout.param.check(param.data) is None:
                continue  # all experts at once: one by one only to name the wrong one
            for module, part in param.filling.parts(param.data):
                check_values(self.name, [f"{module}.{self._spelled(name)}"], layout.param, part)


def expert_parameters(layer: nn.Module) -> dict[str, AscendExpertParameter]:
    """The parameters of a layer that are in their stored form."""
    return {n: p for n, p in layer.named_parameters(recurse=False) if isinstance(p, AscendExpertParameter)}
