"""What is left to do under a vLLM that this package does not know: refuse our checkpoints, and harm nobody else's."""

import functools
import logging
import os
from typing import Any

from quant_core import CheckpointFolder, QuantError, detect_formats
from vllm_ascend_quant import compat

logger = logging.getLogger("vllm.ascend_quant")


def refuse_ours(error: QuantError) -> None:
    """Say once what is wrong, and raise it for a model whose folder is in one of our formats."""
    logger.warning("%s\n  until then: models of our formats are refused, all others are left to vLLM", error)
    try:
        owner, attribute = compat.module_level(compat.CREATE_MODEL_CONFIG)
        original = getattr(owner, attribute)
    except (ImportError, AttributeError):
        return  # so unlike those that we know that there is nothing to hold on to
    if hasattr(original, "refuses_ours"):
        return

    @functools.wraps(original)
    def create_model_config(engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        model = str(engine_args.model)
        if os.path.isdir(model) and detect_formats(CheckpointFolder(model)):
            raise error
        return original(engine_args, *args, **kwargs)

    create_model_config.refuses_ours = True  # type: ignore[attr-defined]
    setattr(owner, attribute, create_model_config)
