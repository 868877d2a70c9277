"""Groups of input features that share a scale."""

from quant_core.schemes.context import LayerContext


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
