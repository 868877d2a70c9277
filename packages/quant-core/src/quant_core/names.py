"""From an engine's module names to those of a checkpoint, by data that the engine gives.

An engine may rename modules and fuse neighbours. It tells how: a function from a checkpoint's names to its own, and
mappings from the last component of a fused module to those of its members. Names are compared component by component,
never by substring. Where an engine renames in a way that no function of one name can tell, it builds the table of
`ModuleNames` itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from quant_core.errors import LayerResolutionError, listing

#: A checkpoint's module name to the engine's, None if the engine ignores it.
Rename = Callable[[str], str | None]

#: The last component of a fused module to those of its members, in order.
PackedModules = Mapping[str, Sequence[str]]


class Members(NamedTuple):
    """What a checkpoint has of one module of an engine.

    Attributes:
        modules: the checkpoint's modules, in order; empty if it knows nothing of the engine's module.
        absent: the members of a fused module that the checkpoint lacks: by the names of those that it has, or, where
            the engine's names are those of the members, by these.

    """

    modules: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


class ModuleNames:
    """The modules of a checkpoint under the names that an engine has for them.

    Attributes:
        stored_at: the engine's name of a module to the checkpoint's modules that are loaded into it, in order.

    """

    def __init__(self, stored_at: Mapping[str, tuple[str, ...]]) -> None:
        self.stored_at = stored_at

    @classmethod
    def renamed(cls, modules: Iterable[str], rename: Rename | None = None) -> Self:
        """The modules under their own names, or under those that a function gives them one by one."""
        stored: dict[str, tuple[str, ...]] = {}
        for module in modules:
            name = module if rename is None else rename(module)
            if name is not None:
                stored.setdefault(name, (module,))
        return cls(stored)

    def members(self, name: str, *packed_modules: PackedModules) -> Members:
        """What the checkpoint has of the engine's module `name`.

        A module that is fused in the checkpoint already is found under its own name first. Of several mappings the
        first counts whose members are all there.
        """
        parent, _, last = name.rpartition(".")
        if name in self.stored_at:
            modules = self.stored_at[name]
            return Members(modules, _absent(modules, last, packed_modules))
        partial = Members()
        for packed in packed_modules:
            wanted = [f"{parent}.{member}" if parent else member for member in packed.get(last, ())]
            found = tuple(module for member in wanted for module in self.stored_at.get(member, ()))
            absent = tuple(member for member in wanted if member not in self.stored_at)
            if found and not absent:
                return Members(found)
            if found and not partial.modules:
                partial = Members(found, absent)
        return partial

    def find(self, name: str, *packed_modules: PackedModules) -> tuple[str, ...]:
        """The checkpoint's modules behind the engine's module `name`, in order; empty if there is none.

        Raises:
            LayerResolutionError: if only some members of a fused module are there.

        """
        found, absent = self.members(name, *packed_modules)
        if absent:
            raise LayerResolutionError(
                f"{name}: the checkpoint has only some members of this fused layer",
                found=listing(found),
                expected=f"also {listing(absent)}",
                todo="the checkpoint is incomplete or belongs to another architecture",
            )
        return found


def _absent(modules: Sequence[str], last: str, packed_modules: Iterable[PackedModules]) -> tuple[str, ...]:
    """The members that a mapping names of a fused module beside those that it is loaded from, under their parent."""
    parent = modules[0].rpartition(".")[0]
    found = {module.rpartition(".")[2] for module in modules}
    for packed in packed_modules:
        members = packed.get(last, ())
        if found < set(members) and last not in members and len(modules) < len(members):
            return tuple(f"{parent}.{m}" if parent else m for m in members if m not in found)
    return ()
