"""The compressed-tensors format: not implemented yet.

This release only reserves the name. It registers no format (there is no ``quant_core.formats`` entry point), so that
vLLM loads compressed-tensors checkpoints with its own code whether this package is installed or not.
"""

from quant_compressed_tensors.__about__ import __version__

__all__ = ["__version__"]
