"""Serves quantised checkpoints for Ascend NPUs in vLLM; installed formats and schemes are found by themselves.

The classes are imported when they are asked for: importing this package alone does not import vLLM.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vllm_ascend_quant.__about__ import __version__

if TYPE_CHECKING:
    from vllm_ascend_quant.config import (
        AscendCompressedTensorsConfig,
        AscendModelSlimConfig,
        AscendQuantizationConfig,
    )
    from vllm_ascend_quant.methods.cache import AscendKVCacheMethod
    from vllm_ascend_quant.methods.embedding import AscendEmbeddingMethod
    from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod
    from vllm_ascend_quant.methods.linear import AscendLinearMethod

__all__ = [
    "AscendCompressedTensorsConfig",
    "AscendEmbeddingMethod",
    "AscendFusedMoEMethod",
    "AscendKVCacheMethod",
    "AscendLinearMethod",
    "AscendModelSlimConfig",
    "AscendQuantizationConfig",
    "__version__",
]

_MODULES = {
    "AscendCompressedTensorsConfig": "vllm_ascend_quant.config",
    "AscendEmbeddingMethod": "vllm_ascend_quant.methods.embedding",
    "AscendFusedMoEMethod": "vllm_ascend_quant.methods.experts",
    "AscendKVCacheMethod": "vllm_ascend_quant.methods.cache",
    "AscendLinearMethod": "vllm_ascend_quant.methods.linear",
    "AscendModelSlimConfig": "vllm_ascend_quant.config",
    "AscendQuantizationConfig": "vllm_ascend_quant.config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
