"""The entry point that vLLM calls in every process."""

from vllm_ascend_quant.compat import UnsupportedVllmError, check_version


def register() -> None:
    """Register each installed format under its vLLM name, and wrap what vLLM has no hook for. Re-entrant.

    Models that are none of ours are not to notice: a fault of a stranger's package or a vLLM that this package does not
    know is a warning, and an error only when a checkpoint is opened that has to do with it.
    """
    try:
        check_version()
    except UnsupportedVllmError as error:
        from vllm_ascend_quant.plugin.unsupported import refuse_ours

        refuse_ours(error)
        return
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
