"""The cases of types with floating weights that llm-compressor writes."""

import torch
from case import Case
from float_modules import TOKENS, fp8_module, fp8_static

from quant_core.schemes.linear.wfp8afp8 import AscendWFP8AFP8LinearMethod as FP8Static
from quant_core.schemes.linear.wfp8afp8_dynamic import AscendW8A8FP8DynamicLinearMethod as FP8Dynamic

F32, BF16, F16, MX_NPU = torch.float32, torch.bfloat16, torch.float16, "950"

FLOAT_CASES = {
    "WFP8AFP8_DYNAMIC tensor": Case(FP8Dynamic, lambda o, i: fp8_module(o, i, "tensor", TOKENS), BF16, error=0.05),
    "WFP8AFP8_DYNAMIC scalar": Case(FP8Dynamic, lambda o, i: fp8_module(o, i, "scalar", TOKENS), error=0.05),
    "WFP8AFP8": Case(FP8Static, fp8_static, BF16, error=0.05),
    "WFP8AFP8 scalar": Case(FP8Static, lambda o, i: fp8_static(o, i, "scalar", F32), error=0.05),
    "WFP8AFP8 distinct input scales": Case(
        FP8Static, lambda *a, **o: fp8_static(*a, "channel", F32, **o), distinct_scales=True, error=0.05
    ),
    "WFP8AFP8 on an NPU": Case(FP8Static, fp8_static, F16, device=MX_NPU, error=0.05),
}
