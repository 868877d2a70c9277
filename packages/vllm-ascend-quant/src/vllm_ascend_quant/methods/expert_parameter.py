"""The parameters of a layer of experts, and how they are loaded."""

from collections.abc import Mapping

import torch

from quant_core import Partition
from quant_core.schemes.filling import Filling
from vllm_ascend_quant.methods.parameter import AscendParameter

#: Which member of its half vLLM's shard of an expert is.
_EXPERT_MEMBERS = {"w1": 0, "w3": 1, "w2": 0}


class AscendExpertParameter(AscendParameter):
    """A stack of the experts of this rank.

    Attributes:
        partition: how each of them is cut.
        places: the place in the stack of each expert that is here, by its number over all ranks.

    """

    def __new__(cls, filling: Filling, partition: Partition, places: Mapping[int, int]) -> "AscendExpertParameter":
        """Allocate the local shape."""
        return super().__new__(cls, filling, load_expert)  # type: ignore[return-value]

    def __init__(self, filling: Filling, partition: Partition, places: Mapping[int, int]) -> None:
        super().__init__(filling, load_expert)
        self.partition = partition
        self.places = places


def load_expert(
    param: AscendExpertParameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Weight loader for experts: vLLM's own decides by what is in a parameter's name.

    Returns:
        whether the expert is on this rank, if that is asked for.

    """
    place = param.places.get(expert_id)
    if place is not None:
        rank = param.partition.rank
        cut = {"output_part": rank} if param.partition.kind == "column" else {"input_part": rank}
        param.filling.load(param.data, loaded_weight, _EXPERT_MEMBERS[shard_id], place, **cut)
    return place is not None if return_success else None
