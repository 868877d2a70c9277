"""W4A16 experts: int4 weights, per output channel or per group, multiplied with activations in the model's dtype."""

from quant_core.schemes.linear.w4a16 import AscendW4A16LinearMethod
from quant_core.schemes.moe.w8a16 import AscendW8A16MoEMethod
from quant_core.schemes.registry import register_scheme


@register_scheme("W4A16", "moe")
class AscendW4A16MoEMethod(AscendW8A16MoEMethod):
    """Each product as in a linear layer of this type.

    Run time: as W8A16, with weights as int32 [E, in, out / 8], half a byte per value; as int8 on CPU.
    """

    checked_against = {
        "W4A16": (
            "qwen3-moe/V0_W4A16_GROUP64",
            "llmcompressor/qwen3-moe/W4A16_GROUP",
        )
    }
    linear = AscendW4A16LinearMethod
