"""Which method a layer gets."""

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from quant_core import LayerQuant, QuantFormat
from vllm_ascend_quant import ascend_platform
from vllm_ascend_quant.methods.embedding import AscendEmbeddingMethod
from vllm_ascend_quant.methods.linear import AscendLinearMethod

#: The classes of layers that get a method here.
QUANTISABLE = (LinearBase, VocabParallelEmbedding)


def method_for(
    layer: nn.Module, name: str, quant_format: QuantFormat | None, quant: LayerQuant | None, made_up: bool
) -> QuantizeMethodBase:
    """The method of a linear or vocabulary layer for a format's answer; the platform's own where that is None or float.

    `made_up` says that the first weights are (see AscendLinearMethod).
    """
    vocabulary = isinstance(layer, VocabParallelEmbedding)
    if quant_format is None or quant is None or quant.quant_type is None:
        return UnquantizedEmbeddingMethod() if vocabulary else ascend_platform.unquantised_linear()
    return (AscendEmbeddingMethod if vocabulary else AscendLinearMethod)(quant_format, name, quant, made_up)
