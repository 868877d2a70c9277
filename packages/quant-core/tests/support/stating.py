"""What a format would state of the modules that the tests make: packing, groups, and what lies beside the weight."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from quant_core import ActivationForm, AscendLinearScheme, Packing, StoredForm, StoredTensor, WeightForm
from quant_core.schemes.additions import ADDITIONS
from quant_core.schemes.linear.w4a16 import AscendW4A16LinearMethod


class Stated(dict[str, Tensor]):
    """The stored tensors of a module, with what its format states.

    Attributes:
        weight: how the weight is stored; None for the type's usual form.
        input: how the layer's input is quantised.

    """

    def __init__(
        self, tensors: Mapping[str, Tensor], weight: WeightForm | None = None, tokens: ActivationForm | None = None
    ) -> None:
        super().__init__(tensors)
        self.weight = weight
        self.input = tokens

    def changed(self, **tensors: Tensor) -> "Stated":
        """The same with other tensors."""
        return Stated({**self, **tensors}, self.weight, self.input)


def form(
    module: str, member: Mapping[str, Tensor], scheme_class: type[AscendLinearScheme] | None = None, inputs: int = 0
) -> StoredForm:
    """A module of a scheme, or of no scheme in particular; some packings are told by the input features only."""
    file = "model.safetensors"
    tensors = {s: StoredTensor(f"{module}.{s}", tuple(t.shape), t.dtype, file) for s, t in member.items()}
    usual = scheme_class.stores if scheme_class else None
    if isinstance(member, Stated):
        return StoredForm(module, tensors, member.weight or usual, member.input)
    names = tuple(a.name for a in ADDITIONS if any(suffix in member for suffix in a.suffixes))
    weight = usual and (_float(usual, member) if usual.type == "float" else _integer(usual, member, inputs))
    if weight and weight.num_bits == 4 and scheme_class is AscendW4A16LinearMethod and weight.strategy == "channel":
        plain = inputs == member["weight"].shape[1]
        weight = replace(weight, packing=None if plain else Packing(1))
    return StoredForm(module, tensors, weight, transforms=names)


def _float(usual: WeightForm, member: Mapping[str, Tensor]) -> WeightForm:
    if usual.outer != "group":
        return usual
    groups = member["weight_dual_scale"].shape[1]
    return replace(usual, outer_group_size=-(-member["weight"].shape[1] * 2 // groups))


def _integer(usual: WeightForm, member: Mapping[str, Tensor], inputs: int) -> WeightForm:
    weight, scale = member["weight"], member.get("weight_scale")
    if scale is None or scale.dim() != 2:
        return usual
    along_out = usual.num_bits == 4 and 2 * weight.shape[0] == scale.shape[0]
    outer = "channel" if "weight_channel_scale" in member else None
    offsets = "int" if outer else "float"
    stated = replace(usual, packing=Packing(0) if along_out else None, outer=outer, offset_type=offsets)
    if scale.shape[1] < 2:
        return stated
    return replace(stated, strategy="group", group_size=-(-weight.shape[1] // scale.shape[1]))
