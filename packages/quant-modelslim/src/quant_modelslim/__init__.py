"""Checkpoints written by msModelSlim: which scheme each layer gets."""

from quant_modelslim.__about__ import __version__
from quant_modelslim.description import Description
from quant_modelslim.format import ModelSlimFormat
from quant_modelslim.type_names import FLOAT

__all__ = ["FLOAT", "Description", "ModelSlimFormat", "__version__"]
