"""What vllm-ascend's runtime reads from a quantisation config beyond what vLLM's interface has."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from quant_core import LayerQuant, QuantFormat, list_schemes
from quant_core.schemes.caches import QuantisedPages


def keeps_int8_pages(quant: LayerQuant) -> bool:
    """Whether the type of a cache keeps keys and values as int8, which vllm-ascend's attention has as well."""
    scheme = list_schemes().get((str(quant.quant_type), "attention"))
    return scheme is not None and issubclass(scheme, QuantisedPages) and scheme.cache_dtype == torch.int8


class AscendRuntimeView:
    """The answers; tests/ascend/test_runtime_reads.py has the list of what is read, and where.

    Attributes:
        enable_fa_quant: that latent or other attention quantises with `fa_k` scales. No: schemes of ours that would
            are refused on that platform, so none of what it reads about them is asked for.
        kvcache_quant_layers: the layers that do.

    """

    format: QuantFormat | None
    enable_fa_quant = False
    kvcache_quant_layers: tuple[int, ...] = ()

    @property
    def quant_description(self) -> Mapping[str, Any]:
        """Tensor name to type, where a format has such a thing.

        Asked for norm biases, for which every RMS norm then gets a parameter, and for types that rule out a fusion.
        """
        return {}

    @property
    def enable_c8_quant(self) -> bool:
        """Whether any layer has a cache of int8 whose scales are stored."""
        return bool(self.c8_quant_layers)

    @property
    def c8_quant_layers(self) -> list[int]:
        """The numbers of these layers, as far as their names have one number."""
        caches = {} if self.format is None else self.format.caches
        int8 = [name for name, quant in caches.items() if keeps_int8_pages(quant)]
        numbers = [re.findall(r"(?<=\.)\d+(?=\.)", name) for name in int8]
        return [int(found[0]) for found in numbers if len(found) == 1]
