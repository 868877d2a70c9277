"""What the int4 linear types share: how the weight is stored, and the forms that the operators take."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_core.devices import current_device
from quant_core.packing import pack_eights, unpack_pairs
from quant_core.schemes.context import LayerContext, StoredForm
from quant_core.schemes.int8 import transpose_weight
from quant_core.schemes.params import Param, int4, replace_parameter


def int4_weight(input_size: int, output_size: int, axis: int | None) -> dict[str, Param]:
    """`weight`, int8 [out, in] with two values to a byte along an axis (0: out, 1: in), or one (None)."""
    steps = [2 if axis == i else 1 for i in (0, 1)]
    return {
        "weight": Param(
            (output_size // steps[0], input_size // steps[1]),
            torch.int8,
            output_dim=0,
            input_dim=1,
            output_step=steps[0],
            input_step=steps[1],
            check=int4 if axis is None else None,
        )
    }


def packed_along_out(form: StoredForm) -> bool:
    """Whether two output features share a byte: then the weight has half as many rows as its scale."""
    weight, scale = form.shape("weight", ()), form.shape("weight_scale", ())
    return bool(weight and scale) and 2 * weight[0] == scale[0]


def int4_codes(layer: nn.Module, axis: int | None) -> Tensor:
    """The values of a stored weight, int8 [out, in]."""
    weight = layer.get_parameter("weight").data
    return weight if axis is None else unpack_pairs(weight, axis)


def packed_at_run_time(context: LayerContext, devices: Sequence[str]) -> bool:
    """Whether a layer's weight goes to its operator as int4, which these devices take.

    On CPU it goes as int8, by the same operators' int8 form: unpacking at each call takes several times as long as the
    product for one token.
    """
    outputs = sum(shard.local_output_size for shard in context.shards)
    return current_device() in devices and outputs % 8 == 0


def process_int4_weight(layer: nn.Module, codes: Tensor, packed: bool) -> None:
    """Put the weight in its run-time form: eight output features to an int32 [in, out / 8], or int8 [in, out].

    The packed one is not cast to the NZ layout, which not all operators take.
    """
    if packed:
        replace_parameter(layer, "weight", pack_eights(codes.t()))
    else:
        replace_parameter(layer, "weight", codes)
        transpose_weight(layer)
