"""The cases of types with floating weights that llm-compressor writes."""

from dataclasses import replace

import torch
from case import Case
from float_modules import GROUPS, MXFP4, MXFP8, NVFP4_INPUT, TOKENS, fp8_module, fp8_static, nvfp4, stated, w4afp8
from mx_modules import mxfp4, mxfp8

from quant_core.schemes.linear.w4a4_nvfp4 import AscendW4A4NVFP4LinearMethod as NVFP4ByItself
from quant_core.schemes.linear.w4a8_mxfp4_fp8_dynamic import AscendW4A8MXFP4FP8DynamicLinearMethod as MXFP4ByFP8
from quant_core.schemes.linear.w4a16_mxfp4 import AscendW4A16MXFP4LinearMethod as MXFP4Only
from quant_core.schemes.linear.w4a16_nvfp4 import AscendW4A16NVFP4LinearMethod as NVFP4Only
from quant_core.schemes.linear.w4afp8_dynamic import AscendW4AFP8DynamicLinearMethod as Int4ByFP8
from quant_core.schemes.linear.w8a16_mxfp8 import AscendW8A16MXFP8LinearMethod as MXFP8Only
from quant_core.schemes.linear.wfp8a16 import AscendWFP8A16LinearMethod as FP8Only
from quant_core.schemes.linear.wfp8afp8 import AscendWFP8AFP8LinearMethod as FP8Static
from quant_core.schemes.linear.wfp8afp8_block_dynamic import AscendWFP8AFP8BlockDynamicLinearMethod as FP8Blocks
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
    "WFP8A16": Case(FP8Only, fp8_module, BF16),
    "WFP8A16 tensor": Case(FP8Only, lambda o, i: fp8_module(o, i, "tensor")),
    "WFP8A16 scalar": Case(FP8Only, lambda o, i: fp8_module(o, i, "scalar"), F16),
    "WFP8A16 blocks": Case(FP8Only, lambda o, i: fp8_module(o, i, "block")),
    "WFP8AFP8_BLOCK_DYNAMIC": Case(FP8Blocks, lambda o, i: fp8_module(o, i, "block", GROUPS), error=0.05),
    "WFP8AFP8_BLOCK_DYNAMIC bf16": Case(
        FP8Blocks, lambda o, i: fp8_module(o, i, "block", replace(GROUPS, group_size=24)), BF16, error=0.05
    ),
    "WFP8AFP8_BLOCK_DYNAMIC per token": Case(
        FP8Blocks, lambda o, i: fp8_module(o, i, "block", TOKENS), F16, error=0.05
    ),
    "W8A16_MXFP8": Case(MXFP8Only, stated(mxfp8, MXFP8), BF16),
    "W4A16_MXFP4": Case(MXFP4Only, stated(mxfp4, MXFP4), BF16),
    "W4A16_NVFP4": Case(NVFP4Only, nvfp4, BF16),
    "W4A16_NVFP4 scalar": Case(NVFP4Only, lambda o, i: nvfp4(o, i, scalar=True)),
    "W4A4_NVFP4": Case(NVFP4ByItself, lambda o, i: nvfp4(o, i, NVFP4_INPUT), BF16, error=0.2),
    "W4A4_NVFP4 fp16": Case(NVFP4ByItself, lambda o, i: nvfp4(o, i, NVFP4_INPUT), F16, error=0.2),
    "W4A4_NVFP4 distinct input scales": Case(
        NVFP4ByItself, lambda *a, **o: nvfp4(*a, NVFP4_INPUT, scalar=True, **o), distinct_scales=True, error=0.2
    ),
    "W4AFP8_DYNAMIC": Case(Int4ByFP8, w4afp8, BF16, error=0.05),
    "W4AFP8_DYNAMIC groups": Case(Int4ByFP8, lambda o, i: w4afp8(o, i, 16, asymmetric=True), error=0.05),
    "W4AFP8_DYNAMIC packed": Case(Int4ByFP8, lambda o, i: w4afp8(o, i, packed=True), F16, error=0.05),
    "W4AFP8_DYNAMIC packed groups": Case(Int4ByFP8, lambda o, i: w4afp8(o, i, 32, packed=True), BF16, error=0.05),
    "W4A8_MXFP4_FP8_DYNAMIC": Case(MXFP4ByFP8, stated(mxfp4, MXFP4, GROUPS), BF16, error=0.05),
}
