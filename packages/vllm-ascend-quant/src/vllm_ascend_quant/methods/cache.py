"""Quantised key/value caches.

Scales live in a small module of their own below vLLM's attention layer, so that they are loaded, processed and reloaded
as those of any other layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from quant_core import (
    AscendAttentionScheme,
    AttentionSizes,
    LayerQuant,
    LayerQuery,
    LoadError,
    QuantFormat,
    create_scheme,
)
from quant_core.errors import listing
from quant_core.schemes.context import LinearContext, Shard
from quant_core.schemes.filling import Filling
from quant_core.schemes.layouts import layout_of
from quant_core.schemes.verify import check_values
from vllm_ascend_quant import compat
from vllm_ascend_quant.methods.linear import stored_parameters
from vllm_ascend_quant.methods.parameter import load_replicated, make_parameter

#: Under this name an attention layer holds the module with its scales.
NAME = "quantised_cache"


class CacheScales(nn.Module):
    """The stored tensors of one layer's cache, under canonical names.

    Attributes:
        quant_method: what vLLM calls when they are loaded.

    """

    def __init__(self, method: "AscendKVCacheMethod") -> None:
        super().__init__()
        self.quant_method = method
        method.create_weights(self)


class AscendKVCacheMethod(QuantizeMethodBase):
    """Turns a scheme's declarations into vLLM parameters and delegates the rest.

    Attributes:
        name: the attention layer's path, for messages.
        quant: the format's answer about its cache.
        quant_method: the scheme.
        made_up: whether the first weights are made up (`load_format="dummy"`), so that their values mean nothing.
        restored: whether the scales were processed before they are filled; see files/saved_state.py.
        absent: nothing that the files lack is handed to the scheme.
        deliver: what gets the module with the processed scales, where a platform computes attention by itself.

    """

    def __init__(
        self,
        quant_format: QuantFormat,
        name: str,
        quant: LayerQuant,
        sizes: AttentionSizes,
        params_dtype: torch.dtype,
        made_up: bool,
    ) -> None:
        self.name = name
        self.quant = quant
        self.made_up = made_up
        self.restored = False
        self.absent: dict[str, torch.Tensor] = {}
        self.deliver: Callable[[nn.Module, AscendAttentionScheme], None] | None = None
        scheme = create_scheme(LayerQuery(name, "attention", sizes=sizes, params_dtype=params_dtype), quant)
        assert isinstance(scheme, AscendAttentionScheme)
        self.quant_method = scheme

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """Register what the scheme stores, whole: it is small."""
        context = LinearContext(
            name=self.name,
            params_dtype=self.quant_method.context.params_dtype,
            stored=self.quant.stored,
            shards=(Shard(self.quant.modules[0], 1, 1),),
            input_size=1,
        )
        for name, param in self.quant_method.params().items():
            filling = Filling(layout_of(name, (param,), context), self.name, context.modules)
            layer.register_parameter(name, make_parameter(filling, load_replicated))

    def apply(self, layer: nn.Module, *_: Any, **__: Any) -> torch.Tensor:
        """Nothing is computed with it alone."""
        raise NotImplementedError(f"{self.name}: attention is computed by the layer's impl")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything was loaded and makes sense, then let the scheme take its heads' part.

        Raises:
            LoadError: names what was not loaded, or values that cannot be used.

        """
        if self.restored:
            self.restored = False
            return
        stored = stored_parameters(layer)
        if not self.made_up or any(param.filling.filled for param in stored.values()):
            if missing := self.missing(layer):
                raise LoadError(
                    f"{self.name}: {len(missing)} tensors of its cache were never loaded: {listing(missing)}",
                    where=listing(str(evidence) for evidence in self.quant.evidence),
                    todo="the weights that were sent lack these tensors: check the files, or the iterator of a reload",
                )
            for name, param in stored.items():
                check_values(self.name, [self.tensor(name)], param.param, param.data)
        else:
            for param in stored.values():
                compat.make_up(param)
        for param in stored.values():
            param.begin_again()
        self.make_run_time_form(layer)

    def make_run_time_form(self, layer: nn.Module) -> None:
        """Let the scheme process what was loaded."""
        self.quant_method.process_weights_after_loading(layer)
        if self.deliver is not None:
            self.deliver(layer, self.quant_method)

    def tensor(self, name: str) -> str:
        """The checkpoint's name of a parameter."""
        return self.quant.stored[0].name_of(name)

    def missing(self, layer: nn.Module) -> list[str]:
        """The stored tensors that were not loaded since the layer was last processed."""
        return [self.tensor(name) for name, param in stored_parameters(layer).items() if param.filling.missing()]
