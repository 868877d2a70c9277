"""Keeping our methods ours beside a platform plugin that registers the same names.

vllm-ascend registers `ascend` and `compressed-tensors` when vLLM sets up the platform, after the general plugins, and
again wherever a process imports its quantisation modules; the last registration wins. So vLLM's registry is replaced
by one that does not give up a name of ours. VLLM_ASCEND_QUANT_DISABLE=precedence leaves the names to the platform.
"""

from typing import Any

from vllm.logger import init_logger

from vllm_ascend_quant import compat

logger = init_logger("vllm.ascend_quant")


class KeepingRegistry(dict[str, Any]):
    """vLLM's registry of added methods, in which a held name stays."""

    def __init__(self, methods: dict[str, Any]) -> None:
        super().__init__(methods)
        self.held: dict[str, Any] = {}

    def __setitem__(self, name: str, method: Any) -> None:
        if method is self.held.get(name, method):
            super().__setitem__(name, method)
        else:
            logger.info(
                "%s wants the method %r, which %s keeps (VLLM_ASCEND_QUANT_DISABLE=precedence gives it up)",
                f"{method.__module__}.{method.__qualname__}",
                name,
                self.held[name].__qualname__,
            )


def hold(name: str, method: Any) -> None:
    """From now on, `name` means `method` in this process."""
    owner, attribute = compat.module_level(compat.ADDED_METHODS)
    registry = getattr(owner, attribute)
    if not isinstance(registry, KeepingRegistry):
        registry = KeepingRegistry(registry)
        setattr(owner, attribute, registry)
    registry.held[name] = method
    registry[name] = method
