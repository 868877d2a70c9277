"""What a user sets in vLLM's `additional_config`, below the key `ascend_quant`."""

from typing import Any

from quant_core import LimitError


def is_set(additional_config: Any, name: str) -> bool:
    """Whether an option is true; options are false by themselves.

    Raises:
        LimitError: if it has another value than true or false.

    """
    ours = additional_config.get("ascend_quant", {}) if isinstance(additional_config, dict) else {}
    value = ours.get(name, False) if isinstance(ours, dict) else ours
    if not isinstance(value, bool):
        raise LimitError(
            f"additional_config: ascend_quant is {ours!r}",
            expected=f'{{"ascend_quant": {{"{name}": true}}}}, or false',
        )
    return value
