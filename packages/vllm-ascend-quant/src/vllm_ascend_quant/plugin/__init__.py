"""The entry point that vLLM calls in every process."""

import logging
import os

from vllm_ascend_quant.compat import SUPPORTED, UnsupportedVllmError, check_version, unfit

logger = logging.getLogger("vllm.ascend_quant")

#: Tells the processes of an engine that somebody was warned of this version already.
TOLD = "VLLM_ASCEND_QUANT_NEWER_VLLM"


def register() -> None:
    """Register each installed format under its vLLM name, and wrap what vLLM has no hook for. Re-entrant.

    Models that are none of ours are not to notice: a fault of a stranger's package or a vLLM that this package does not
    know is a warning, and an error only when a checkpoint is opened that has to do with it.
    """
    try:
        newer = check_version()
        if newer is not None and os.environ.get(TOLD) != newer:
            os.environ[TOLD] = newer
            logger.warning(
                "vLLM %s is newer than those that vllm-ascend-quant knows (below %s). It is tried; if something fails, "
                "first try a supported one, or a newer vllm-ascend-quant",
                newer,
                SUPPORTED[1],
            )
        try:
            _register()
        except (ImportError, AttributeError) as error:
            if newer is None:
                raise
            raise unfit(newer, error) from error
    except UnsupportedVllmError as error:
        from vllm_ascend_quant.plugin.unsupported import refuse_ours

        refuse_ours(error)


def _register() -> None:
    # After the check: these import parts of vLLM whose place may differ in other versions.
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_ascend_quant import installed, switches
    from vllm_ascend_quant.config import config_class
    from vllm_ascend_quant.plugin import precedence, wrappers

    for name, quant_format in installed.formats().items():
        register_quantization_config(quant_format.vllm_name)(config_class(name))
        if switches.enabled("precedence"):
            precedence.hold(quant_format.vllm_name, config_class(name))
    wrappers.install(wrappers.ALWAYS)
