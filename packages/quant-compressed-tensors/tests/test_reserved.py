"""The package reserves its name and does nothing else."""

from importlib import metadata

import quant_compressed_tensors

DISTRIBUTION = "quant-compressed-tensors"


def test_imports_with_the_version_of_its_distribution() -> None:
    assert quant_compressed_tensors.__version__ == metadata.version(DISTRIBUTION)


def test_registers_no_format() -> None:
    """A registered format would take these checkpoints away from vLLM's own code and then fail to load them."""
    assert not metadata.distribution(DISTRIBUTION).entry_points
