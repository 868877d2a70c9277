"""The config of ModelSlim checkpoints."""

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm_ascend_quant.config import AscendQuantizationConfig


class AscendModelSlimConfig(AscendQuantizationConfig):
    """`--quantization ascend`: a folder that msModelSlim wrote."""

    format_name: ClassVar[str] = "modelslim"

    @property
    def quant_description(self) -> Mapping[str, Any]:
        """Tensor name to type, as the description file has it; vllm-ascend's runtime looks here."""
        description = getattr(self.format, "description", None)
        return {} if description is None else description.types
