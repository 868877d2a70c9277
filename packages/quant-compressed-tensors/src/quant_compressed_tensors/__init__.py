"""The compressed-tensors checkpoint format, as llm-compressor writes it."""

from quant_compressed_tensors.__about__ import __version__

__all__ = ["__version__"]
