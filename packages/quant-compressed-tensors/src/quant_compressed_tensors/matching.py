"""Which groups of a section a module belongs to, and whether it is ignored.

The rule is the library's (compressed_tensors.utils.match): an exact name before a pattern, a pattern before the name of
a class, alphabetically within each, over all groups; patterns are anchored at the start only. It is written again for
one reason: the library matches with Python's `re`, in which a hostile pattern runs for hours, and `regex` can be given
a limit of time.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import regex

from quant_core import CheckpointError

_PATTERN = "re:"

#: Seconds that one pattern may take with one name; a sane one takes microseconds.
_PATIENCE = 0.5


class Match(NamedTuple):
    """A group, and its target that matches."""

    group: str
    target: str


class Matcher:
    """The targets of all groups and the entries of `ignore`.

    Args:
        targets: of each group.
        ignore: names, patterns and classes.
        place: the section's key, for messages.

    Raises:
        CheckpointError: if an entry is no valid pattern.

    """

    def __init__(self, targets: Mapping[str, Sequence[str]], ignore: Sequence[str], place: str) -> None:
        owners: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        for group, entries in targets.items():
            for entry in entries:
                owners[entry] = group  # of several groups with one target, the last counts
                self._keys[entry] = f"{place}.config_groups.{group}.targets"
        for entry in ignore:
            self._keys.setdefault(entry, f"{place}.ignore")
        self._targets = [Match(group, target) for target, group in sorted(owners.items(), key=_library_order)]
        self._ignore = tuple(ignore)
        self._patterns = {entry: self._compiled(entry) for entry in self._keys if entry.startswith(_PATTERN)}

    def groups(self, module: str, classes: Sequence[str]) -> list[Match]:
        """The groups of a module, those that count first in front.

        Args:
            module: its name in the checkpoint.
            classes: the names of its class and those above it, in this order.

        """
        named = [match for match in self._targets if self.matches(match.target, module)]
        of_class = [match for name in classes for match in self._targets if match.target == name]
        return list(dict.fromkeys([*named, *of_class]))

    def ignored(self, module: str, classes: Sequence[str]) -> str | None:
        """The entry of `ignore` that a module matches; None if there is none."""
        return next((entry for entry in self._ignore if entry in classes or self.matches(entry, module)), None)

    def matches(self, entry: str, module: str) -> bool:
        """Whether an entry names a module.

        Raises:
            CheckpointError: if a pattern takes too long.

        """
        pattern = self._patterns.get(entry)
        if pattern is None:
            return entry == module
        try:
            return pattern.match(module, timeout=_PATIENCE) is not None
        except TimeoutError as error:
            raise CheckpointError(
                f"a pattern in config.json takes longer than {_PATIENCE} seconds with one name: {entry[:200]!r}",
                where=f"config.json: {self._keys[entry]}",
                found=f"the name {module}",
                expected="a pattern without nested repetitions, such as 're:.*down_proj$'",
                todo="write it more simply",
                file="config.json",
            ) from error

    def _compiled(self, entry: str) -> "regex.Pattern[str]":
        text = entry.removeprefix(_PATTERN)
        try:
            re.compile(text)  # what the writer used
            return regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"config.json has a pattern that is no regular expression: {entry[:200]!r}",
                where=f"config.json: {self._keys[entry]}",
                found=str(error),
                todo="correct the pattern",
                file="config.json",
            ) from error


def _library_order(owned: tuple[str, str]) -> tuple[bool, str]:
    target = owned[0]
    return _PATTERN in target, target
