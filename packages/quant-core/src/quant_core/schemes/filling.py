"""Filling the parameters of a layer, or of a stack of layers, from a checkpoint, and knowing what came."""

from collections.abc import Iterator

from torch import Tensor

from quant_core.errors import LoadError
from quant_core.schemes.layouts import ParamLayout


class Filling:
    """What was loaded into one parameter. An engine copies through it; the record never steers copying.

    Attributes:
        layout: how the parameter is laid out.
        owner: the layer's name, for messages.
        modules: the checkpoint modules of each layer of a stack; one entry for a layer by itself.
        filled: (layer, member) of what was loaded.

    """

    def __init__(self, layout: ParamLayout, owner: str, modules: tuple[tuple[str, ...], ...]) -> None:
        self.layout = layout
        self.owner = owner
        self.modules = modules
        self.filled: set[tuple[int, int]] = set()

    def load(
        self, data: Tensor, loaded: Tensor, member: int = 0, layer: int = 0, output_part: int = 0, input_part: int = 0
    ) -> None:
        """Copy this rank's part of one module's stored tensor to its place in `data`.

        Raises:
            LoadError: if the tensor is not what was declared.

        """
        if loaded.dim() == 0 and self.layout.members[member].shape:
            loaded = loaded.reshape(1)
        self.check(loaded, member, layer)
        target = self.layout.part(data, member, layer)
        target.copy_(self.layout.cut(loaded, member, output_part, input_part))
        self.filled.add((layer, member))

    def check(self, loaded: Tensor, member: int = 0, layer: int = 0) -> None:
        """Make sure that a tensor is what was declared.

        Raises:
            LoadError: names the layer, what was found and what was expected.

        """
        param = self.layout.members[member]
        if tuple(loaded.shape) != param.shape or not param.takes(loaded.dtype):
            which = f" of layer {layer} of the stack" if self.layout.depth is not None else ""
            raise LoadError(
                f"{self.owner}: {self.layout.name} of member {member}{which} does not fit",
                found=f"{loaded.dtype} {list(loaded.shape)}",
                expected=f"{param.dtype} {list(param.shape)}",
                todo="load weights of the type and size that the model was started with",
            )

    def missing(self) -> list[str]:
        """The modules of which nothing was loaded."""
        return [
            name
            for layer, names in enumerate(self.modules)
            for member, name in enumerate(names)
            if (layer, member) not in self.filled
        ]

    def parts(self, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each module and what is held of it."""
        for layer, names in enumerate(self.modules):
            for member, name in enumerate(names):
                yield name, self.layout.part(data, member, layer)
