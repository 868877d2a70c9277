"""Experts whose tokens vllm-ascend brings to the ranks that hold them.

Its layer hands over the router's logits, and expects that the method chooses experts, has tokens sent, multiplies, and
has the results sent back. Where a type quantises tokens to int8 they are sent so, otherwise in the model's dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.ascend_forward_context import _EXTRA_CTX
from vllm_ascend.flash_common3_context import get_flash_common3_context
from vllm_ascend.ops.fused_moe.experts_selector import select_experts
from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult
from vllm_ascend.ops.fused_moe.moe_runtime_args import MoEQuantParams, MoERoutingParams, MoETokenDispatchInput
from vllm_ascend.quantization.quant_type import QuantType

from quant_core import LimitError
from quant_core.schemes.routing import Rows
from vllm_ascend_quant.methods.experts import AscendFusedMoEMethod

#: Attributes of vllm-ascend's layer for arrangements that no scheme here follows, and what they are.
_UNSERVED = {
    "zero_expert_num": "experts that compute nothing (zero_expert_num)",
    "mix_placement": "shared experts placed among the routed ones (mix_placement)",
    "dynamic_eplb": "load balancing of experts (EPLB)",
    "log2phy": "experts that are placed by a map, or several times",
}


class AscendDispatchedFusedMoEMethod(AscendFusedMoEMethod):
    """AscendFusedMoEMethod as vllm-ascend's layer of experts calls it.

    Attributes:
        tid2eid: int32 [token ids, k], the experts of each token id, where the model routes so.

    """

    tid2eid: Tensor | None = None

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As on any platform.

        Raises:
            QuantError: as there, and for arrangements of experts that no scheme follows.

        """
        for name, meaning in _UNSERVED.items():
            value = getattr(layer, name, None)
            if isinstance(value, Tensor) or value:
                raise LimitError(
                    f"{self.name}: quantised experts are not served with {meaning}",
                    todo="serve without it; or leave the format to vllm-ascend, by its name in "
                    "VLLM_ASCEND_QUANT_DISABLE",
                )
        super().create_weights(layer, *args, **kwargs)

    @property
    def is_monolithic(self) -> bool:
        """False: what vLLM's own layer would ask; vllm-ascend's calls `apply` in any case."""
        return False

    def apply(self, layer: nn.Module, x: Tensor, router_logits: Tensor, **options: Any) -> Any:  # type: ignore[override]
        """The weighted sum over all ranks' experts, or this rank's part of it, as the way of sending is.

        Args:
            layer: vllm-ascend's, with the processed parameters.
            x: [tokens, hidden].
            router_logits: [tokens, experts].
            **options: how experts are chosen, and where they are; vllm-ascend's names.

        Returns:
            vllm-ascend's FusedExpertsResult.

        """
        scheme, sender = self.quant_method, _EXTRA_CTX.moe_comm_method.token_dispatcher
        weights, ids = self._chosen(x, router_logits, options)
        if scheme.context.sizes.weight_on_input:  # here, since its dispatcher would multiply again when it combines
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        sent = sender.token_dispatch(
            token_dispatch_input=MoETokenDispatchInput(
                hidden_states=x,
                topk_weights=weights.to(x.dtype),
                topk_ids=ids,
                routing=MoERoutingParams(
                    expert_map=options.get("expert_map"),
                    global_redundant_expert_num=options.get("global_redundant_expert_num", 0),
                    mc2_mask=options.get("mc2_mask"),
                    apply_router_weight_on_input=False,
                ),
                quant=MoEQuantParams(QuantType.W8A8 if scheme.sends_int8 else QuantType.NONE),
            )
        )
        counts = sent.group_list
        if sent.group_list_type == 0:  # where each expert's rows end
            counts = torch.cat([counts[:1], counts.diff()])
        counts = counts.to(torch.int64)
        if sent.dynamic_scale is None:
            y = scheme.compute_float(layer, sent.hidden_states, counts, x.dtype)
        else:
            y = scheme.compute(layer, Rows(sent.hidden_states, sent.dynamic_scale, counts), x.dtype)
        routed = sender.token_combine(hidden_states=y, combine_metadata=sent.combine_metadata)
        return FusedExpertsResult(routed, group_list_type=sent.group_list_type, expert_tokens=sent.group_list)

    def _chosen(self, x: Tensor, router_logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts: [tokens, k] both."""
        if get_ascend_config().multistream_overlap_gate:  # the layer has chosen already, in another stream
            context = get_flash_common3_context()
            return context.topk_weights, context.topk_ids
        names = (
            "top_k",
            "use_grouped_topk",
            "renormalize",
            "topk_group",
            "num_expert_group",
            "custom_routing_function",
            "scoring_func",
            "routed_scaling_factor",
            "e_score_correction_bias",
        )
        experts = router_logits.shape[1]
        weights, ids = select_experts(
            hidden_states=x,
            router_logits=router_logits,
            num_logical_experts=experts,
            num_experts=experts,
            tid2eid=self.tid2eid,
            **{name: options[name] for name in names if name in options},
        )
        if options.get("enable_force_load_balance"):  # while memory is measured: tokens spread over all experts
            ids = torch.rand(len(ids), experts, device=ids.device).argsort(dim=1)[:, : ids.shape[1]].to(ids.dtype)
        return weights, ids
