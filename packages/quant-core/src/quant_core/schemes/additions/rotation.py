"""Online rotations (QuaRot, LAOS): the input is multiplied by orthogonal matrices before it is quantised.

The weights were rotated the other way when the checkpoint was written, so the product is unchanged, but outliers are
spread (docs/formats/modelslim.md, section 6).
"""

from torch import Tensor, nn

from quant_core.schemes.additions.base import Addition
from quant_core.schemes.context import LinearContext
from quant_core.schemes.params import Param, finite, tensor_of


class Rotation(Addition):
    """What both rotations have in common: square matrices that mix features of all tensor-parallel ranks."""

    @classmethod
    def can_serve(cls, context: LinearContext) -> list[str]:
        """Whole, and of matrices that fit the input."""
        reasons = []
        sizes = [context.form.shape(suffix, ()) for suffix in cls.suffixes]
        if any(len(size) != 2 or size[0] != size[1] for size in sizes):
            found = ", ".join(f"{s} {list(size)}" for s, size in zip(cls.suffixes, sizes, strict=True))
            reasons.append(f"expected square matrices, the files hold {found}")
        elif not cls.fits([size[0] for size in sizes], context.input_size):
            reasons.append(
                f"{' and '.join(cls.suffixes)} of {' x '.join(str(size[0]) for size in sizes)} do not rotate "
                f"{context.input_size} input features"
            )
        if context.partition.input_parts > 1:
            reasons.append(
                f"{cls.suffixes[0]} mixes input features of all {context.partition.size} tensor-parallel ranks: "
                "use tensor_parallel_size 1"
            )
        return reasons

    @staticmethod
    def fits(sizes: list[int], input_size: int) -> bool:
        """Whether matrices of these sizes rotate so many features."""
        raise NotImplementedError

    def params(self, input_size: int, output_size: int) -> dict[str, Param]:
        """The matrices, the same for all members of a fused layer, since those have one input."""
        form = self.context.form
        return {
            name: Param(form.shape(name, ()), form.float_dtype(name), shared=True, check=finite)
            for name in self.suffixes
        }


class HeadsRotation(Rotation):
    """x' = heads_rotationᵀ · X, with x as X [heads, head size]."""

    name = "heads_rotation"
    suffixes = ("heads_rotation",)

    @staticmethod
    def fits(sizes: list[int], input_size: int) -> bool:
        """Whole heads."""
        return sizes[0] > 0 and input_size % sizes[0] == 0

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Each feature of a head becomes a mixture of that feature of all heads."""
        rotation = tensor_of(layer, "heads_rotation")
        heads = x.reshape(-1, rotation.shape[0], x.shape[-1] // rotation.shape[0])
        return (rotation.t() @ heads).reshape(x.shape)

    def turned_back(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """heads_rotation · W for each output feature's W [heads, head size]."""
        rotation = tensor_of(layer, "heads_rotation").to(weight.dtype)
        turned: Tensor = rotation @ weight.unflatten(1, (rotation.shape[0], -1))
        return turned.flatten(1)


class KroneckerRotation(Rotation):
    """x' = kronecker_rotation_mᵀ · X · kronecker_rotation_n, with x as X [M, N]."""

    name = "kronecker_rotation"
    suffixes = ("kronecker_rotation_m", "kronecker_rotation_n")

    @staticmethod
    def fits(sizes: list[int], input_size: int) -> bool:
        """M · N features."""
        return sizes[0] * sizes[1] == input_size

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Two small products in the place of one with a matrix of [in, in]."""
        left, right = tensor_of(layer, "kronecker_rotation_m"), tensor_of(layer, "kronecker_rotation_n")
        matrix = x.reshape(-1, left.shape[0], right.shape[0])
        return (left.t() @ matrix @ right).reshape(x.shape)

    def turned_back(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """kronecker_rotation_m · W · kronecker_rotation_nᵀ for each output feature's W [M, N]."""
        left, right = (tensor_of(layer, name).to(weight.dtype) for name in self.suffixes)
        turned: Tensor = left @ weight.unflatten(1, (left.shape[0], right.shape[0])) @ right.t()
        return turned.flatten(1)
