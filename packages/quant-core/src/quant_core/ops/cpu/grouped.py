"""Products of many experts (docs/operators.md, section 6): a loop over those that have rows.

Each is the product of a linear layer with the same operands, to the last bit. Rows behind those of the last expert
become zero; the device leaves them as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.ops.cpu.grouped_product import Experts, Operand
from quant_core.ops.cpu.groups import ROWS, Group, batches_of, end_of, groups_of
from quant_core.ops.dtypes import dtype_of


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Operand = None,
    scale: Operand = None,
    offset: Operand = None,
    antiquant_scale: Operand = None,
    antiquant_offset: Operand = None,
    per_token_scale: Operand = None,
    group_list: Tensor | Sequence[int] | None = None,
    activation_input: Operand = None,
    activation_quant_scale: Operand = None,
    activation_quant_offset: Operand = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Rows of each expert times its weight, with all that `npu_quant_matmul` or `npu_weight_quant_batchmatmul` do.

    Args:
        x: one tensor [m, k] that group_list cuts into the rows of each expert; or one for each expert, none for absent.
        weight: one tensor [E, k, n], or one [k, n] for each expert. int8, int4 in int32, FP8, FP4, or x's own dtype.
        bias: [n] each; int32 is added to the sums, anything else to the scaled result. Of int8 x int4 it is float32,
            8 Σ w · scale, and scaled per token.
        scale: [n] each. Of int8 x int4 in int32: int64 [groups, n], a float32 in the low half of each. Of MX: exponents
            [ceil(k / 64), n, 2]. Ours: float32 [groups, n] for int8 x int8, and none of the shift of int8 x int4.
        offset: not supported on CPU.
        antiquant_scale: of floating x: [n] or [groups, n] each. Beside FP8 x and FP4 weights: as scale.
        antiquant_offset: as antiquant_scale; it is added.
        per_token_scale: [m], for MX exponents [m, ceil(k / 64), 2]; one for each x.
        group_list: int64, see groups.py.
        activation_input: not supported on CPU, nor are the next two.
        activation_quant_scale: see above.
        activation_quant_offset: see above.
        split_item: 0: a result for each x; 1: one for each expert; 2 and 3: one for all.
        group_type: 0 cuts rows; -1 nothing, each x has its weight. 2, which is for training, is not supported on CPU.
        group_list_type: see groups.py.
        act_type: 0; activations are not supported on CPU.
        tuning_config: a hint for the device.
        output_dtype: None is x's dtype; float32 for quantised operands is ours.
        x_dtype: FP4, where x is uint8.
        weight_dtype: FP4, where weights are uint8.
        scale_dtype: E8M0, where scales are uint8.
        per_token_scale_dtype: as scale_dtype.

    Returns:
        As split_item says, each [rows, n].

    Raises:
        NotImplementedError: for what the CPU kernel does not have.
        ValueError: for operands that do not fit together.

    """
    unsupported = {
        "offset": offset,
        "activation_input": activation_input,
        "activation_quant_scale": activation_quant_scale,
        "activation_quant_offset": activation_quant_offset,
        "act_type": act_type,
    }
    given = [name for name, value in unsupported.items() if value]
    if given or group_type not in ((-1, 0) if isinstance(group_list, Tensor) else (-1, 0, None)):
        raise NotImplementedError(
            f"npu_grouped_matmul: the CPU kernel has no group_type {group_type} and no {', '.join(given) or 'more'}"
        )
    experts = Experts(
        weight,
        x[0].dtype if output_dtype is None else dtype_of(output_dtype),
        bias,
        scale,
        antiquant_scale,
        antiquant_offset,
        x_dtype,
        weight_dtype,
        scale_dtype,
        per_token_scale_dtype,
    )
    if group_list is None or len(x) > 1:
        return _of_each(experts, x, per_token_scale, split_item)
    groups = groups_of("npu_grouped_matmul", group_list, group_list_type, len(experts), len(x[0]))
    return _of_one(experts, x[0], per_token_scale[0] if per_token_scale else None, groups, split_item)


def grouped_product(experts: Experts, x: Tensor, token_scale: Tensor | None, groups: Sequence[Group]) -> Tensor:
    """The products of all groups, one below the other; zero behind the last one.

    Args:
        experts: what to multiply with.
        x: [m, k].
        token_scale: [m, ...], or none.
        groups: which rows belong to whom.

    Returns:
        [m, n].

    """
    result = None
    shortened = token_scale is None and experts.target == torch.float16  # scales, by the matmul unit
    together = experts.target.is_floating_point and not shortened and experts.multiplies_plainly(x)
    for batch in batches_of(groups, ROWS if together else 0):
        product = experts.products(batch, x, token_scale)
        if result is None:
            if len(product) == len(x):
                return product
            result = torch.empty(len(x), product.shape[1], dtype=product.dtype, device="cpu")
        result[batch[0].rows.start : batch[-1].rows.stop] = product
    if result is None:  # nobody has rows; one product of none tells the shape
        nothing = experts.product(0, x[:0], None if token_scale is None else token_scale[:0])
        return torch.zeros(len(x), nothing.shape[1], dtype=nothing.dtype, device="cpu")
    result[end_of(groups) :] = 0
    return result


def _of_one(
    experts: Experts, x: Tensor, token_scale: Tensor | None, groups: Sequence[Group], split_item: int | None
) -> list[Tensor]:
    if split_item in (2, 3):
        return [grouped_product(experts, x, token_scale, groups)]
    if split_item != 1:
        raise ValueError(
            "npu_grouped_matmul: one x for several experts has split_item 1 (a result for each) or 2 and 3 (one for "
            f"all), not {split_item}"
        )
    parts = dict(groups)
    return [
        experts.product(expert, x[rows], None if token_scale is None else token_scale[rows])
        for expert in range(len(experts))
        for rows in [parts.get(expert, slice(0, 0))]
    ]


def _of_each(experts: Experts, x: Sequence[Tensor], token_scale: Operand, split_item: int | None) -> list[Tensor]:
    if len(x) != len(experts):
        raise ValueError(
            f"npu_grouped_matmul: {len(x)} tensors x for {len(experts)} experts; a single one needs a group_list"
        )
    products = [
        experts.product(expert, rows, token_scale[expert] if token_scale else None) for expert, rows in enumerate(x)
    ]
    return [torch.cat(products)] if split_item in (2, 3) else products
