"""The formats that are served here: those that are installed, without those that the user switched off."""

from quant_core import QuantFormat, list_formats
from vllm_ascend_quant.switches import enabled


def formats() -> dict[str, type[QuantFormat]]:
    """The formats by name. A format is switched off by its name; vLLM then does with its checkpoints what it likes."""
    return {name: quant_format for name, quant_format in list_formats().items() if enabled(name)}


def methods() -> set[str]:
    """What vLLM calls them (`--quantization`)."""
    return {quant_format.vllm_name for quant_format in formats().values()}
