"""Which groups of a section a module belongs to, and whether it is ignored.

The rule is the library's (compressed_tensors.utils.match): an exact name before a pattern, a pattern before the name of
a class, alphabetically within each, over all groups; patterns are anchored at the start only. It is written again for
two reasons: the library matches with Python's `re`, in which a hostile pattern runs for hours, and `regex` can be given
a limit of time; and writers list what is ignored name by name, which must not cost every module a look at every name.
"""

import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import regex

from quant_core import CheckpointError

_PATTERN = "re:"

#: Seconds that one pattern may take with one name, and that slow ones may take in all. A sane one takes microseconds.
_PATIENCE = 0.5
_PATIENCE_IN_ALL = 5.0
_SLOW = 1e-4

#: Characters of all patterns of a section, and repetitions of the parts of one: `regex` takes 350 bytes for each that
#: `(a{3000}){3000}` asks for, and no limit of time holds while it compiles.
_MOST_CHARACTERS = 500_000
_MOST_REPETITIONS = 100_000
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


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
        CheckpointError: if an entry is no valid pattern, or one that would fill the memory.

    """

    def __init__(self, targets: Mapping[str, Sequence[str]], ignore: Sequence[str], place: str) -> None:
        self._keys: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        for group, entries in targets.items():
            for entry in entries:
                self._owners[entry] = group  # of several groups with one target, the last counts
                self._keys[entry] = f"{place}.config_groups.{group}.targets"
        for entry in ignore:
            self._keys.setdefault(entry, f"{place}.ignore")
        self._ignored = frozenset(ignore)
        self._patterns = self._compiled_all()
        self._target_patterns = sorted(entry for entry in self._patterns if entry in self._owners)
        self._ignore_patterns = [entry for entry in self._patterns if entry in self._ignored]
        self._spent = 0.0

    def groups(self, module: str, classes: Sequence[str]) -> list[Match]:
        """The groups of a module, those that count first in front.

        Args:
            module: its name in the checkpoint.
            classes: the names of its class and those above it, in this order.

        """
        found = [module] if module in self._owners else []
        found += [entry for entry in self._target_patterns if self.matches(entry, module)]
        found += [name for name in classes if name in self._owners and name != module]
        return [Match(self._owners[target], target) for target in found]

    def ignored(self, module: str, classes: Sequence[str]) -> str | None:
        """The entry of `ignore` that a module matches; None if there is none."""
        for name in (module, *classes):
            if name in self._ignored:
                return name
        return next((entry for entry in self._ignore_patterns if self.matches(entry, module)), None)

    def names_one_of(self, entry: str, modules: Iterable[str]) -> bool:
        """Whether an entry names any of the modules."""
        return any(self.matches(entry, module) for module in modules) if entry in self._patterns else entry in modules

    def matches(self, entry: str, module: str) -> bool:
        """Whether an entry names a module.

        Raises:
            CheckpointError: if a pattern takes too long.

        """
        pattern = self._patterns.get(entry)
        if pattern is None:
            return entry == module
        started = time.perf_counter()
        try:
            return pattern.match(module, timeout=_PATIENCE) is not None
        except TimeoutError:
            raise self._too_slow(entry, module, f"{_PATIENCE} seconds with one name") from None
        finally:
            if (taken := time.perf_counter() - started) > _SLOW:
                self._spent += taken
                if self._spent > _PATIENCE_IN_ALL:
                    raise self._too_slow(entry, module, f"{_PATIENCE_IN_ALL} seconds with the names of this model")

    def _too_slow(self, entry: str, module: str, limit: str) -> CheckpointError:
        return CheckpointError(
            f"a pattern in config.json takes longer than {limit}: {entry[:200]!r}",
            where=f"config.json: {self._keys[entry]}",
            found=f"the name {module}",
            expected="a pattern without nested repetitions, such as 're:.*down_proj$'",
            todo="write it more simply",
            file="config.json",
        )

    def _compiled_all(self) -> "dict[str, regex.Pattern[str]]":
        patterns = [entry for entry in self._keys if entry.startswith(_PATTERN)]
        left = _MOST_CHARACTERS
        for entry in patterns:
            left -= len(entry)
            if left < 0 or _repetitions(entry) > _MOST_REPETITIONS:
                raise self._unusable(
                    entry, "a pattern of a size that would fill the memory", f"{len(entry)} characters"
                )
        return {entry: self._compiled(entry) for entry in patterns}

    def _compiled(self, entry: str) -> "regex.Pattern[str]":
        text = entry.removeprefix(_PATTERN)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                re.compile(text)  # what the writer used
                return regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise self._unusable(entry, "a pattern that is no regular expression", str(error)) from error

    def _unusable(self, entry: str, what: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"config.json has {what}: {entry[:200]!r}",
            where=f"config.json: {self._keys[entry]}",
            found=found,
            todo="correct the pattern",
            file="config.json",
        )


def _repetitions(text: str) -> int:
    """How often a part of a pattern is repeated at most, as if all counts stood inside each other."""
    return math.prod(max([1, *(int(count[:9]) for count in counts if count)]) for counts in _COUNTS.findall(text)[:50])
