"""Checkpoints written by msModelSlim: which scheme each layer gets."""

from quant_modelslim.__about__ import __version__
from quant_modelslim.description import FLOAT, Description
from quant_modelslim.format import ModelSlimFormat

__all__ = ["FLOAT", "Description", "ModelSlimFormat", "__version__"]
