"""Quantisation schemes for Ascend NPUs, with the same operators on CPU.

Schemes are found by (quantisation type, layer type) in a registry, checkpoint formats by entry points; both may come
from other packages. Nothing here knows an inference engine.
"""

from quant_core import ops as ops
from quant_core.__about__ import __version__
from quant_core.checkpoint import CheckpointFolder, PlannedFolder
from quant_core.errors import (
    CheckpointError,
    Finding,
    LayerResolutionError,
    LimitError,
    LoadError,
    QuantError,
    RegistrationError,
    UnknownLayerError,
    UnsupportedSchemeError,
    raise_findings,
)
from quant_core.formats import (
    Detection,
    Evidence,
    LayerQuant,
    LayerQuery,
    QuantFormat,
    detect_formats,
    list_formats,
)
from quant_core.judging import create_scheme
from quant_core.schemes import params
from quant_core.schemes.base import AscendLinearScheme, Scheme
from quant_core.schemes.caches import AscendAttentionScheme, AttentionBatch, Pages
from quant_core.schemes.context import (
    DOWN,
    GATE_UP,
    AttentionContext,
    AttentionSizes,
    ExpertsContext,
    ExpertSizes,
    LayerContext,
    LinearContext,
    LinearSizes,
    Partition,
    Shard,
)
from quant_core.schemes.experts import AscendMoEScheme
from quant_core.schemes.params import Param
from quant_core.schemes.registry import get_scheme_class, list_schemes, register_scheme, require_scheme_class
from quant_core.stored import ActivationForm, Packing, StoredForm, StoredTensor, WeightForm

__all__ = [
    "DOWN",
    "GATE_UP",
    "ActivationForm",
    "AscendAttentionScheme",
    "AscendLinearScheme",
    "AscendMoEScheme",
    "AttentionBatch",
    "AttentionContext",
    "AttentionSizes",
    "CheckpointError",
    "CheckpointFolder",
    "Detection",
    "Evidence",
    "ExpertSizes",
    "ExpertsContext",
    "Finding",
    "LayerContext",
    "LayerQuant",
    "LayerQuery",
    "LayerResolutionError",
    "LimitError",
    "LinearContext",
    "LinearSizes",
    "LoadError",
    "Packing",
    "Pages",
    "Param",
    "Partition",
    "PlannedFolder",
    "QuantError",
    "QuantFormat",
    "RegistrationError",
    "Scheme",
    "Shard",
    "StoredForm",
    "StoredTensor",
    "UnknownLayerError",
    "UnsupportedSchemeError",
    "WeightForm",
    "__version__",
    "create_scheme",
    "detect_formats",
    "get_scheme_class",
    "list_formats",
    "list_schemes",
    "ops",
    "params",
    "raise_findings",
    "register_scheme",
    "require_scheme_class",
]
