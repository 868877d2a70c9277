"""Results without their values."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def on_meta(arguments: Any) -> Any:
    """The same arguments with tensors on the meta device, their strides included: they tell a transposed weight."""
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), arguments
    )


def outline(result: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor.

    Not strides: torch_npu's Meta kernels follow the input, while its kernels (and ours) fill fresh memory in order.
    """
    return [(tuple(leaf.shape), leaf.dtype) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
