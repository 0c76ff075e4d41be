"""How the code is built: imports run downward and in no circle, files are short, arguments travel by name."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400
PACKAGES = ("siglip_kernels", "bench", "hub")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sources(*PACKAGES)
}


def imported(module: str) -> set[str]:
    """The modules of MODULES that one imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{module}: a relative import"
            # ``from package import module``, or a name that the package itself defines.
            found |= {
                name if name in MODULES else node.module for name in (f"{node.module}.{a.name}" for a in node.names)
            }
    return (found & set(MODULES)) - {module}


def room(module: str) -> str:
    """The folder of a module, or itself where it lies at the top of its package."""
    package, _, rest = module.partition(".")
    return f"{package}.{rest.split('.')[0]}" if rest else package


GRAPH = {module: imported(module) for module in MODULES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert not circle(GRAPH)


def test_no_rooms_import_each_other() -> None:
    """So that they can be drawn one above the other, with every import downward."""
    rooms: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        rooms.setdefault(room(module), set()).update({room(other) for other in others} - {room(module)})
    assert not circle(rooms)


def test_the_package_imports_nothing_above_it() -> None:
    above = [
        (module, other) for module in GRAPH for other in GRAPH[module]
        if module.startswith("siglip_kernels") and other.startswith(("bench", "hub"))
    ]  # fmt: skip
    assert not above


def test_a_circle_is_noticed() -> None:
    graph = {**GRAPH, "siglip_kernels.pairs": {"siglip_kernels.loss"}}
    assert {"siglip_kernels.pairs", "siglip_kernels.loss"} <= set(circle(graph))


@pytest.mark.parametrize("folder", ["siglip_kernels", "bench", "hub", "tests", "csrc", "examples"])
def test_files_are_short(folder: str) -> None:
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h"}
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert lengths
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


def counted_positions(text: str) -> list[str]:
    """Places of an argument that are counted: ``call[3]``, ``args[:4]``, ``*_, last = args``."""
    bundles = {"args", "arguments", "call", "others", "rest", "request", "task", "inputs"}
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in bundles:
            is_name = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            found += [] if is_name else [ast.unparse(node)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in bundles:
            found += [ast.unparse(node) for target in node.targets if isinstance(target, ast.Tuple)]
    return found


def test_arguments_travel_by_name() -> None:
    found = {
        module: places
        for module, path in MODULES.items()
        if module.startswith("siglip_kernels") and (places := counted_positions(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize("text", ["call[14]", "args[:4]", "*_, dx, dy = args", "rest[-1]"])
def test_a_counted_position_is_noticed(text: str) -> None:
    assert counted_positions(text)
