"""Storages: the tensors of one checkpoint module that hold its weight, declared, checked, quantised and dequantised.

A storage knows how numbers are kept and nothing of what is computed with them: that is a scheme's part, and schemes of
several types share one storage. It goes by what a format states (`StoredForm.weight`), never by shapes.
"""

from quant_core.storage.base import Storage, tensors_of
from quant_core.storage.fp8 import FP8Storage
from quant_core.storage.integer import IntegerStorage
from quant_core.storage.microscaled import MicroscaledStorage
from quant_core.storage.nvfp4 import NVFP4Storage
from quant_core.storage.static import StaticStorage, UnfoldedStorage

__all__ = [
    "FP8Storage",
    "IntegerStorage",
    "MicroscaledStorage",
    "NVFP4Storage",
    "StaticStorage",
    "Storage",
    "UnfoldedStorage",
    "tensors_of",
]
