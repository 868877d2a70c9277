"""What a user switched off, by naming it in the environment variable VLLM_ASCEND_QUANT_DISABLE.

The names, separated by commas, are in the package's README: the functions of vLLM that are wrapped
(plugin/wrappers.py), `precedence` (plugin/precedence.py), `zeros` (loading/contents.py), and formats (installed.py).
"""

import os

DISABLE = "VLLM_ASCEND_QUANT_DISABLE"


def enabled(name: str) -> bool:
    """Whether the user has not switched this off."""
    return name not in {part.strip() for part in os.environ.get(DISABLE, "").split(",")}
