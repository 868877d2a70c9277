"""Other ways to multiply by the same weight on this processor. Each is left out, with a word, where it cannot run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: After the name of one that computes something else on this processor.
WRONG = " (wrong)"

#: From an input to a call without arguments.
Prepare = Callable[[Tensor], Callable[[], Any]]


def prepare_all(weight: Tensor) -> Iterator[tuple[str, Prepare]]:
    """Name and preparation of each competitor, for a float32 weight [out, in]."""
    yield "float32", lambda x: _call(linear, x.float(), weight)
    low = weight.to(torch.bfloat16)
    yield "bfloat16", lambda x: _call(linear, x.to(torch.bfloat16), low)
    codes = torch.ops.npu.npu_dynamic_quant(weight)
    yield "_int_mm", lambda x: _call(torch._int_mm, torch.ops.npu.npu_dynamic_quant(x)[0], codes[0].t())
    for name, make in (("vLLM oneDNN", _vllm), ("torchao", _torchao)):
        try:
            prepare = make(weight, *codes)
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        wrong = make is _vllm and not _exact(prepare, *codes)
        yield f"{name}{WRONG}" if wrong else name, prepare


def _exact(prepare: Prepare, codes: Tensor, scales: Tensor) -> bool:
    """Whether it multiplies these codes as they are: without VNNI, oneDNN's sums saturate at 16 bits."""
    x = torch.randn(4, codes.shape[1])
    quantised, x_scale = torch.ops.npu.npu_dynamic_quant(x)
    want = (quantised.double() @ codes.double().t()) * x_scale[:, None] * scales
    # A quantiser that multiplies by the reciprocal rounds a few codes the other way.
    return bool((prepare(x)() - want).norm() < 2e-3 * want.norm())


def _call(function: Callable[..., Any], *operands: Tensor) -> Callable[[], Any]:
    return lambda: function(*operands)


def _vllm(weight: Tensor, codes: Tensor, scales: Tensor) -> Prepare:
    """vLLM's quantiser and product, which it uses for int8 checkpoints of compressed-tensors."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    def prepare(x: Tensor) -> Callable[[], Tensor]:
        handler = ops.create_onednn_scaled_mm(codes.t(), scales, x.dtype, dynamic_quant=True, use_azp=False)

        def run() -> Tensor:
            quantised, x_scale, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
            output = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype)
            return ops.onednn_scaled_mm(handler, quantised, output, x_scale, None, None, None)

        return run

    prepare(torch.zeros(1, weight.shape[1]))()  # whether it runs at all
    return prepare


def _torchao(weight: Tensor, codes: Tensor, scales: Tensor) -> Prepare:
    """torchao's linear layer with int8 weights and dynamically quantised activations."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def prepare(x: Tensor) -> Callable[[], Tensor]:
        layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=x.dtype))
        layer[0].weight.data = weight.to(x.dtype)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        return _call(layer.requires_grad_(False), x)

    prepare(torch.zeros(1, weight.shape[1]))()
    return prepare
