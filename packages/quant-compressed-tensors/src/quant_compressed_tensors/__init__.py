"""The compressed-tensors checkpoint format, as llm-compressor writes it."""

from quant_compressed_tensors.__about__ import __version__
from quant_compressed_tensors.format import CompressedTensorsFormat

__all__ = ["CompressedTensorsFormat", "__version__"]
