"""From an engine's module names to those of a checkpoint, by data that the engine gives.

An engine may rename modules and fuse neighbours. It tells how: a function from a checkpoint's names to its own, and a
mapping from the last component of a fused module to those of its members. Names are compared component by component,
never by substring.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from quant_core.errors import LayerResolutionError, listing

#: A checkpoint's module name to the engine's, None if the engine ignores it.
Rename = Callable[[str], str | None]


class ModuleNames:
    """The modules of a checkpoint under the names that an engine has for them."""

    def __init__(self, modules: Iterable[str], rename: Rename | None = None) -> None:
        self._stored: dict[str, str] = {}
        for module in modules:
            renamed = module if rename is None else rename(module)
            if renamed is not None:
                self._stored.setdefault(renamed, module)

    def find(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The checkpoint modules behind the engine's module `name`, in order; empty if there is none.

        A module that is fused in the checkpoint already is found under its own name first.

        Raises:
            LayerResolutionError: if only some members of a fused module are there.

        """
        if name in self._stored:
            return (self._stored[name],)
        parent, _, last = name.rpartition(".")
        members = packed_modules.get(last, ())
        wanted = [f"{parent}.{member}" if parent else member for member in members]
        found = [self._stored[member] for member in wanted if member in self._stored]
        if found and len(found) < len(wanted):
            absent = [member for member in wanted if member not in self._stored]
            raise LayerResolutionError(
                f"{name}: the checkpoint has only some members of this fused layer",
                found=listing(found),
                expected=f"also {listing(absent)}",
                todo="the checkpoint is incomplete or belongs to another architecture",
            )
        return tuple(found)
