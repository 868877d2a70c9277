"""*Exact TP*: results that do not depend on the tensor-parallel size.

A row-parallel layer's activation is cut over the ranks, and each rank by itself would quantise its slice with a scale
of its own, as vllm-ascend does. With `--additional-config '{"ascend_quant": {"exact_tp": true}}'` the ranks agree on
the scale of the whole token first, at the price of one reduction of one number per token.
"""

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config

from vllm_ascend_quant import options


def exact_tp_wanted() -> bool:
    """Whether the configuration of the model that is being built asks for it; raises as options.is_set."""
    return options.is_set(get_current_vllm_config().additional_config, "exact_tp")


@torch.library.custom_op("vllm_ascend_quant::max_over_ranks", mutates_args=())
def max_over_ranks(values: Tensor) -> Tensor:
    """Element-wise maximum over the tensor-parallel ranks. An operator, so that compiled code can hold it."""
    from vllm.distributed import get_tp_group

    result = values.clone()
    torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX, get_tp_group().device_group)
    return result


@max_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)
