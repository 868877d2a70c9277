"""What differs where vllm-ascend is vLLM's platform, as on an NPU. No module outside this folder knows how.

Its own classes of layers are subclasses of vLLM's, so most of this package works with them unchanged. Written against
vllm-ascend 0.23.0.post1, and tested with its real code on a CPU: tests/ascend. Nothing here has run on an NPU.
"""

import functools
import importlib
from typing import TYPE_CHECKING, Any

from quant_core import LimitError

if TYPE_CHECKING:
    from torch import nn

    from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod


@functools.cache
def is_active() -> bool:
    """Whether vLLM runs on vllm-ascend's platform in this process."""
    platform = importlib.import_module("vllm.platforms").current_platform
    return type(platform).__module__.startswith("vllm_ascend.")


def unquantised_linear() -> Any:
    """The platform's method for a linear layer in float: vllm-ascend's own brings weights into the NPU's layout."""
    if is_active():
        return importlib.import_module("vllm_ascend.ops.linear").AscendUnquantizedLinearMethod()
    return importlib.import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod()


def unquantised_experts(layer: "nn.Module", tid2eid: Any = None) -> Any:
    """The platform's method for experts in float.

    Args:
        layer: of experts.
        tid2eid: by token id which experts it goes to, where a model routes so (DeepSeek-V4's first layers).

    """
    if is_active():
        fused_moe = importlib.import_module("vllm_ascend.ops.fused_moe.fused_moe")
        return fused_moe.AscendUnquantizedFusedMoEMethod(layer.moe_config, tid2eid=tid2eid)
    return importlib.import_module("vllm.model_executor.layers.fused_moe").UnquantizedFusedMoEMethod(layer.moe_config)


def for_experts(method: Any, layer: "nn.Module", tid2eid: Any = None, **_: Any) -> Any:
    """What a layer of experts is to get where our answer is `method`, or None for float experts.

    vLLM makes its own of None; vllm-ascend does not, and says more about a layer than vLLM.
    """
    if not is_active():
        return method
    if method is None:
        return unquantised_experts(layer, tid2eid)
    method.tid2eid = tid2eid
    return method


def refuse_absorbed(name: str, quant_type: str) -> None:
    """See that no layer is quantised whose weight vllm-ascend's latent attention multiplies into others.

    Raises:
        LimitError: names the layer.

    """
    if is_active():
        raise LimitError(
            f"{name}: vllm-ascend's latent attention (MLA) reads the weight of this layer in float",
            found=f"a {quant_type} layer",
            todo="leave kv_b_proj in float when the model is quantised",
            layer=name,
        )


def expert_method_class() -> "type[AscendFusedMoEMethod]":
    """What serves quantised experts here: as the platform calls it."""
    if is_active():
        from vllm_ascend_quant.ascend_platform.experts import AscendDispatchedFusedMoEMethod

        return AscendDispatchedFusedMoEMethod
    from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod

    return AscendFusedMoEMethod
