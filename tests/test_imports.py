"""The rooms of the project: who may import whom, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import those before it.
ROOMS = ("metaquery", "toy", "data", "training", "benchmarks", "notebooks")
COMMANDS = ("train", "sample", "app")
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0].removesuffix(".py") in (*ROOMS, *COMMANDS, "tests")
)


def module_of(path):
    """toy/scene.py as "toy.scene"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The project's own modules that a file imports, at its top or inside functions."""
    modules = {module_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in modules)


def room(module):
    return module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_keep_their_direction(path):
    own = room(module_of(path))
    for name in imports_of(path):
        if own == "tests":
            assert not name.startswith("tests.test_"), "no test imports another"
            continue
        assert room(name) not in (*COMMANDS, "tests"), "nobody imports the commands"
        if own in ROOMS and room(name) != own:
            assert ROOMS.index(room(name)) < ROOMS.index(own), f"{own} may not import {name}"


def test_there_is_no_circle():
    edges = {module_of(path): set(imports_of(path)) for path in FILES}
    while leaves := [module for module, needs in edges.items() if not needs & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, f"a circle among {sorted(edges)}"


def test_the_method_imports_nothing_of_the_project():
    assert not list(imports_of(ROOT / "metaquery.py"))


def test_no_file_touches_the_search_path():
    assert not [path for path in FILES if "sys.path" in path.read_text() and path != Path(__file__)]
