"""Bench's rooms import downward only, and no two modules each other."""

from __future__ import annotations

import ast
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
# A room imports itself and those before it.
ROOMS = ["harness", "static", "microbenchmark", "gpu", "scaling", "study", "end_to_end"]
# None of these is below another.
VERBS = {"gpu", "scaling", "study", "end_to_end"}
MODULES = {".".join(path.relative_to(BENCH.parent).with_suffix("").parts) for path in BENCH.rglob("*.py")}


def imported(module: str) -> set[str]:
    """The modules of bench that ``module`` imports anywhere, in functions too."""
    tree = ast.parse((BENCH.parent / (module.replace(".", "/") + ".py")).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & MODULES


def room(module: str) -> str | None:
    """None for bench/__init__.py and bench/__main__.py."""
    _, *parts = module.split(".")
    return parts[0] if len(parts) > 1 else None


def test_rooms_import_downward() -> None:
    assert {room(module) for module in MODULES} == {None, *ROOMS}
    edges = {(room(module), room(other)) for module in MODULES for other in imported(module) if room(module)}
    edges = {(upper, lower) for upper, lower in edges if lower is not None and upper != lower}
    assert [(u, w) for u, w in edges if ROOMS.index(u) < ROOMS.index(w) or {u, w} <= VERBS] == []
    assert ("gpu", "microbenchmark") in edges


def test_no_circle() -> None:
    left = {module: imported(module) for module in MODULES}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    assert sorted(left) == []
