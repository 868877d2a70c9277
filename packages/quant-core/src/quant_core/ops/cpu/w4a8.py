"""int8 activations times int4 weights in groups of 256 (docs/operators.md, sections 4 and 6)."""

import torch
from torch import Tensor

from quant_core.ops.cpu.int4 import int8_weight
from quant_core.ops.cpu.int8_gemm import int8_gemm
from quant_core.ops.cpu.quantize import fp19
from quant_core.ops.dtypes import dtype_of

#: Input features that share a scale; the device has no other length.
GROUP = 256

# float32 is ours: the device has 16-bit results only.
_TARGETS = (torch.float16, torch.bfloat16, torch.float32)


def w4a8_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    group_sizes: list[int] | None,
) -> Tensor:
    """(Σ over groups of ((x1 - 8) @ x2) * scale + offset) * pertoken_scale.

    The device multiplies x1 - 8; an offset of 8 Σ x2 * scale makes it x1 again, and nothing else does.

    Args:
        x1: int8 [m, k], k a multiple of 256.
        x2: int4 in int32 [k, n / 8].
        scale: int64 [k / 256, n] as `npu_trans_quant_param` encodes it.
        offset: float32 [n].
        pertoken_scale: float32 [m, 1].
        bias: none, as on the device.
        output_dtype: float16 or bfloat16; float32 is ours.
        group_sizes: [0, 0, 256], which is also what None means.

    Returns:
        [m, n].

    Raises:
        NotImplementedError: for another output dtype or other groups.
        ValueError: for operands that do not fit each other, or that the device refuses.

    """
    target = torch.int8 if output_dtype is None else dtype_of(output_dtype)
    if target not in _TARGETS:
        raise NotImplementedError(f"npu_quant_matmul: int8 x int4 has no output {target}; it has {list(_TARGETS)}")
    if list(group_sizes or (0, 0, GROUP)) != [0, 0, GROUP]:
        raise NotImplementedError(f"npu_quant_matmul: int8 x int4 has groups [0, 0, {GROUP}], not {group_sizes}")
    _check(x1, x2, scale, offset, pertoken_scale, bias)
    weight, columns = int8_weight(x2, x1.shape[1]), fp19(scale)
    assert offset is not None
    assert pertoken_scale is not None
    return ((sum_of_groups(x1, weight, columns, shift=8) + offset) * pertoken_scale).to(target)


def sum_of_groups(x1: Tensor, weight: Tensor, scale: Tensor, shift: int = 0) -> Tensor:
    """Σ over groups of ((x1 - shift) @ weight) * scale.

    Args:
        x1: int8 [m, k].
        weight: int8 [k, n].
        scale: float32 [groups, n], groups of equal length.
        shift: what is subtracted from x1.

    Returns:
        float32 [m, n].

    """
    total = torch.zeros(x1.shape[0], weight.shape[1], dtype=torch.float32, device="cpu")
    length = x1.shape[1] // len(scale)
    for group, columns in enumerate(scale):
        part = slice(group * length, (group + 1) * length)
        sums = int8_gemm(x1[:, part].contiguous(), weight[part])
        if shift:
            sums -= shift * weight[part].sum(dim=0, dtype=torch.int32)
        total += sums * columns
    return total


def _check(
    x1: Tensor, x2: Tensor, scale: Tensor, offset: Tensor | None, pertoken_scale: Tensor | None, bias: Tensor | None
) -> None:
    if x1.dim() != 2 or x2.dim() != 2 or x2.shape[0] != x1.shape[1] or x1.shape[1] % GROUP:
        raise ValueError(
            f"npu_quant_matmul: x1 {list(x1.shape)} and x2 {list(x2.shape)}, expected int8 [m, k] and int4 in int32 "
            f"[k, n / 8] with k a multiple of {GROUP}"
        )
    (m, k), n = x1.shape, x2.shape[1] * 8
    wanted: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "scale": (scale, torch.int64, (k // GROUP, n)),
        "offset": (offset, torch.float32, (n,)),
        "pertoken_scale": (pertoken_scale, torch.float32, (m, 1)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"npu_quant_matmul: {name} of int8 x int4 is {found}, expected {dtype} {list(shape)}")
    if bias is not None:
        raise ValueError("npu_quant_matmul: int8 x int4 takes no bias")
