"""The rooms of the package: who may import whom, no circles, and no imports inside functions but the command line's."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "recur_gpt2"
# A room imports from the floors below it and from itself; rooms of one floor do not know each other.
FLOORS = [
    {"errors"},
    {"utils"},
    {"ops"},
    {"models", "data"},
    {"training", "embedding"},
    {"evaluation"},
    {"budget"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"__init__", "sentence_transformers", "lm_eval"}  # what users import from the package itself
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts)


NAMES = {name_of(path) for path in MODULES}


def imports_of(path):
    """(imported module of ours, or another's package; inside a function) of every import in a file."""
    package = name_of(path).split(".")[:-1]

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *filter(None, [child.module])])
                for alias in child.names:
                    whole = f"{module}.{alias.name}"
                    yield whole if whole in NAMES else module, inside
            yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def ours(path):
    found = {module for module, _ in imports_of(path) if module.partition(".")[0] == PACKAGE.name}
    return {module if module in NAMES else f"{module}.__init__" for module in found}


def room_of(module):
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_from_the_floors_below_alone(path):
    room = room_of(name_of(path))
    if room in DOORS:
        return
    for module in ours(path):
        other = room_of(module)
        assert other == room or FLOOR[other] < FLOOR[room], f"{name_of(path)} may not import {module}"


def test_no_circles():
    try:
        TopologicalSorter({name_of(path): ours(path) for path in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_inside_functions_are_the_command_lines_alone():
    inside = {name_of(path) for path in MODULES if any(within for _, within in imports_of(path))}
    assert {module for module in inside if room_of(module) != "cli"} == set()
