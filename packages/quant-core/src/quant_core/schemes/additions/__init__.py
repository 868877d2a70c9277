"""What may be stored beside a linear layer's own tensors, whatever its type; see base.py."""

from quant_core.schemes.additions.base import Addition
from quant_core.schemes.additions.low_rank import LowRank
from quant_core.schemes.additions.rotation import HeadsRotation, KroneckerRotation

ADDITIONS: tuple[type[Addition], ...] = (HeadsRotation, KroneckerRotation, LowRank)

__all__ = ["ADDITIONS", "Addition"]
