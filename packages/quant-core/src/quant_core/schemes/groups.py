"""Groups of input features that share a scale."""

import torch

from quant_core.schemes.context import LayerContext, StoredForm
from quant_core.schemes.params import Param, ValueCheck, positive, zero


def groups_of(context: LayerContext, suffix: str = "weight_scale") -> int:
    """How many groups the input features form, told by the stored scale's shape [out, groups]; 1 is per channel."""
    shape = context.form.shape(suffix, (1, 1))
    return shape[1] if len(shape) == 2 and shape[1] > 0 else 1


def unequal_groups(context: LayerContext, suffix: str = "weight_scale") -> list[str]:
    """A reason against serving input features that the groups do not divide evenly; empty if they do."""
    groups = groups_of(context, suffix)
    if context.input_size % groups == 0:
        return []
    return [f"{context.input_size} input features cannot be cut into {groups} equal groups"]


def scale_params(
    form: StoredForm, input_size: int, output_size: int, groups: int = 1, stage: str = "", offset: ValueCheck = zero
) -> dict[str, Param]:
    """`weight_scale` and `weight_offset` [out, groups].

    Args:
        form: what the checkpoint module stores; the offset is declared only if it is among that.
        input_size: input features of the checkpoint module.
        output_size: output features of the checkpoint module.
        groups: of input features; one is per channel.
        stage: follows both names.
        offset: judges the offset's values.

    """
    params = {}
    for name, check, dummy in ((f"weight_scale{stage}", positive, 1.0), (f"weight_offset{stage}", offset, 0.0)):
        if check is not offset or form.has(name, default=True):
            params[name] = Param(
                (output_size, groups),
                # The tool writes the offsets of a second stage as int64.
                form.dtype(name, torch.float32) if stage and check is offset else form.float_dtype(name),
                output_dim=0,
                input_dim=1 if groups > 1 else None,
                input_step=input_size // groups if groups > 1 else 1,
                check=check,
                dummy=dummy,
            )
    return params
