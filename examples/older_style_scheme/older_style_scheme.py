"""A scheme as people wrote them for vllm-ascend, ported by changing its imports.

Its hooks return plain tensors, it is made without arguments, transposes its weight in place and keeps it packed under
another name. A new scheme is better written as the one in the documentation of quant_core.schemes.base.
"""

from typing import Any

import torch

from quant_core import AscendLinearScheme, register_scheme  # was: .base and .registry

torch_npu = torch.ops.npu  # was: import torch_npu


@register_scheme("W8A8_OLDER_STYLE", "linear")
class AscendW8A8OlderStyleLinearMethod(AscendLinearScheme):
    def __init__(self) -> None:
        self.act_quant_type = torch.int8

    def get_weight(self, input_size: int, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        return {"weight": torch.empty(output_size, input_size, dtype=torch.int8)}

    def get_perchannel_param(self, output_size: int, params_dtype: torch.dtype) -> dict[str, Any]:
        return {
            "weight_scale": torch.empty(output_size, 1, dtype=params_dtype),
            "weight_offset": torch.empty(output_size, 1, dtype=params_dtype),
        }

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight.data = layer.weight.data.transpose(0, 1).contiguous()
        packed = layer.weight.data.view(torch.int32)
        del layer.weight
        layer.weight_packed = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight_scale.data = layer.weight_scale.data.flatten().float()
        layer.weight_offset.data = layer.weight_offset.data.flatten()

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, tp_rank: int | None = 0
    ) -> torch.Tensor:
        shape = x.shape
        quantized_x, pertoken_scale = torch_npu.npu_dynamic_quant(x.view(-1, shape[-1]), dst_type=self.act_quant_type)
        output = torch_npu.npu_quant_matmul(
            quantized_x,
            layer.weight_packed.view(torch.int8),
            layer.weight_scale,
            pertoken_scale=pertoken_scale,
            bias=bias,
            output_dtype=x.dtype,
        )
        return output.view(*shape[:-1], -1)
