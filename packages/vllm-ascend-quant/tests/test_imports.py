"""Imports inside the package point one way, as the module map in CONTRIBUTING.md has it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import vllm_ascend_quant

NAME = "vllm_ascend_quant"
SOURCE = Path(vllm_ascend_quant.__file__).parent
MAP = Path(__file__).parents[3] / "CONTRIBUTING.md"


def imported() -> dict[str, set[str]]:
    """Each module of the package with those that it imports, inside functions too."""
    found = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in SOURCE.rglob("*.py")}
    modules = {name.removesuffix(".__init__").removesuffix("__init__"): file for name, file in found.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        ours = [node for node in nodes if (node.module or "").split(".")[0] == NAME]
        wanted = {f"{node.module}.{alias.name}" for node in ours for alias in node.names} | {
            str(n.module) for n in ours
        }
        inside = {module.removeprefix(NAME).removeprefix(".") for module in wanted}
        graph[name] = (inside & modules.keys()) - {name, ""}
    return graph


def layers() -> list[str]:
    """The rows of the module map, as prefixes of module names."""
    text = MAP.read_text(encoding="utf-8").partition(f"/src/{NAME}/`")[2].partition("Imports point one way")[0]
    rows = re.findall(r"^\| `([a-z_/.]+)`(?: \(the rest\))? \|", text, re.MULTILINE)
    return [row.removesuffix("/").removesuffix(".py").replace("/", ".") for row in rows]


def test_there_is_no_cycle() -> None:
    graph = imported()
    assert len(graph) > 20
    del graph[""]  # the public names, which are imported when they are asked for
    TopologicalSorter(graph).prepare()


def test_the_module_map_is_true() -> None:
    """Every module stands in it, and imports only what stands at its place or below."""
    order = layers()

    def place(module: str) -> int:
        rows = [row for row in order if module == row or module.startswith(f"{row}.")]
        return order.index(max(rows, key=len))

    graph = {module: uses for module, uses in imported().items() if module not in ("", "__about__")}
    upwards = [f"{module} -> {used}" for module, uses in graph.items() for used in uses if place(used) < place(module)]
    assert upwards == []


def asks_for_a_version(node: ast.AST) -> bool:
    """Whether it imports what versions are compared with, or reads one."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "packaging"
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "packaging" for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in {"__version__", "__version_tuple__"}


def test_one_module_asks_for_versions() -> None:
    """By its code, whatever comments and messages say. A report compares what distributions say, and knows none."""
    files = {file.relative_to(SOURCE).as_posix(): file for file in SOURCE.rglob("*.py")}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    asking = {name for name, tree in trees.items() if any(map(asks_for_a_version, ast.walk(tree)))}
    assert asking == {"compat.py", "reporting/packages.py"}
