"""Which experts a token chooses, and with what weights (docs/operators.md, section 9)."""

import torch
from torch import Tensor


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x), in float32.

    Args:
        x: logits [..., experts], two or three axes.
        finished: bool [...]: tokens that are done choose no expert: the id is the number of experts.
        k: how many.

    Returns:
        Weights [..., k] in x's dtype, int32 ids, of equals the first, and int32 numbers of all choices, column by
        column: choice j of token i is j · tokens + i.

    """
    weights, ids = _largest(x.to(torch.float32).softmax(dim=-1), k)
    if finished is not None:
        ids = ids.masked_fill(finished[..., None], x.shape[-1])
    tokens = x.shape[:-1].numel()
    numbers = torch.arange(tokens * k, dtype=torch.int32, device="cpu").view(k, tokens).t().contiguous()
    return weights.to(x.dtype), ids.to(torch.int32), numbers.view(ids.shape)


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k experts with the largest scores in the best groups of experts, in float32.

    Args:
        x: logits [tokens, experts].
        k: how many experts.
        bias: [experts], added to the scores for choosing, not to the weights.
        input_ids: not supported on CPU.
        tid2eid: not supported on CPU.
        k_group: how many groups experts are chosen from.
        group_count: how many groups of equal size there are.
        group_select_mode: a group is as good as its best expert (0) or its best two together (1).
        renorm: 0.
        norm_type: scores are softmax (0) or sigmoid (1); the weights of the latter are divided by their sum.
        out_flag: whether scores are wanted.
        routed_scaling_factor: multiplies the weights.
        eps: added to that sum.

    Returns:
        Weights [tokens, k] in x's dtype, int32 ids, and float32 scores [tokens, experts], zeros if they are not wanted.

    Raises:
        NotImplementedError: for modes that the CPU kernel does not have.
        ValueError: for groups that experts do not fill.

    """
    if (
        renorm
        or norm_type not in (0, 1)
        or group_select_mode not in (0, 1)
        or input_ids is not None
        or tid2eid is not None
    ):
        raise NotImplementedError(
            f"npu_moe_gating_top_k: the CPU kernel has no renorm={renorm}, norm_type={norm_type}, "
            f"group_select_mode={group_select_mode}, input_ids given: {input_ids is not None}"
        )
    if x.shape[1] % group_count or not 1 <= k_group <= group_count or k > k_group * (x.shape[1] // group_count):
        raise ValueError(
            f"npu_moe_gating_top_k: {x.shape[1]} experts do not give {k} in {k_group} of {group_count} groups"
        )
    logits = x.to(torch.float32)
    scores = logits.sigmoid() if norm_type == 1 else logits.softmax(dim=-1)
    ranked = scores if bias is None else scores + bias.to(torch.float32)
    if k_group < group_count:
        grouped = ranked.unflatten(1, (group_count, -1))
        best = grouped.topk(min(2, grouped.shape[2]) if group_select_mode == 1 else 1, dim=2).values.sum(dim=2)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _largest(best, k_group)[1], True)
        ranked = grouped.masked_fill(~chosen[..., None], float("-inf")).flatten(1)
    ids = _largest(ranked, k)[1]
    weights = scores.gather(1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(dim=1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, ids.to(torch.int32), scores if out_flag else torch.zeros_like(scores)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis and where they are, of equals the first."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), places[..., :k].contiguous()
