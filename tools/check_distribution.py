"""Check what was built of a package: `check_distribution.py packages/NAME WHEEL SDIST` says what is wrong and fails.

Runs in the environment of `nox -s build`, for `packaging`.
"""

import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

from packaging.requirements import Requirement

LICENSE = "Apache-2.0"


def version_of(package: Path) -> str:
    """The version in `__about__.py`, without importing anything."""
    about: dict[str, str] = {}
    exec((package / "src" / package.name.replace("-", "_") / "__about__.py").read_text(), about)
    return about["__version__"]


def complaints(package: Path, wheel: Path, sdist: Path) -> list[str]:
    """What is wrong with the two files; empty if nothing is."""
    module, version = package.name.replace("-", "_"), version_of(package)
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        in_sdist = {file.name: archive.extractfile(file).read() for file in archive if file.isfile()}
    info, top = f"{module}-{version}.dist-info", f"{module}-{version}"
    if f"{info}/METADATA" not in in_wheel or f"{top}/PKG-INFO" not in in_sdist:
        return [f"wheel or sdist is not of the version {version}, which __about__.py says"]

    terms, readme = (package.parents[1] / "LICENSE").read_bytes(), (package / "README.md").read_bytes()
    wanted = {f"{module}/py.typed": b"", f"{info}/licenses/LICENSE": terms, f"{info}/METADATA": readme}
    wrong = [f"wheel: {name}" for name in unlike(wanted, in_wheel)]
    tests = {str(file.relative_to(package)) for file in (package / "tests").rglob("*.py")}
    wanted = {f"src/{module}/py.typed": b"", "LICENSE": terms, "README.md": readme, "CHANGELOG.md": b""}
    wanted |= dict.fromkeys(tests, b"")
    wrong += [f"sdist: {name}" for name in unlike({f"{top}/{name}": end for name, end in wanted.items()}, in_sdist)]
    problems = [f"{name} is absent, or not what it should be" for name in wrong]
    # Tests are for the sdist: from a wheel they would land beside everybody's packages.
    strays = [name for name in in_wheel if name.split("/")[0] not in (module, info) or "tests" in name.split("/")]
    problems += [f"wheel: {name} does not belong there" for name in strays]
    return problems + metadata_complaints(package.name, version, in_wheel[f"{info}/METADATA"])


def unlike(wanted: dict[str, bytes], members: dict[str, bytes]) -> list[str]:
    """The names that are no members, or do not end as they should."""
    return [name for name, end in wanted.items() if name not in members or not members[name].endswith(end)]


def metadata_complaints(name: str, version: str, metadata: bytes) -> list[str]:
    """What is wrong with the metadata of a wheel."""
    fields = BytesParser().parsebytes(metadata)
    expected = {"Name": name, "Version": version, "License-Expression": LICENSE, "Requires-Python": ">=3.11"}
    problems = [f"{key} is {fields[key]}, not {value}" for key, value in expected.items() if fields[key] != value]
    problems += [f"Project-URL {url} is no https" for url in fields.get_all("Project-URL", []) if "https://" not in url]
    for line in fields.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        operators = {specifier.operator for specifier in requirement.specifier}
        # A library that pins one release cannot be installed beside others. Before 1.0 our own may change at any minor.
        range_of = {">=", "<"} if requirement.name.startswith("quant-") else {">="}
        if requirement.name != name and not (range_of <= operators <= {">=", "<", "!="}):
            problems.append(f"Requires-Dist {line} is no range with {' and '.join(sorted(range_of))}")
    return problems


if __name__ == "__main__":
    found = complaints(*(Path(argument).resolve() for argument in sys.argv[1:]))
    sys.exit("\n".join(f"{Path(sys.argv[2]).name}: {problem}" for problem in found) or 0)
