"""Serves quantised checkpoints for Ascend NPUs in vLLM; installed formats and schemes are found by themselves."""

from vllm_ascend_quant.__about__ import __version__

__all__ = ["__version__"]
