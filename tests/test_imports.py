"""The rooms of the project: who may import whom, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("toy", "data", "training", "benchmarks", "notebooks", "extras", "tests")
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.parent == ROOT or path.relative_to(ROOT).parts[0] in FOLDERS
)
# What each room may import of the others, beside itself.
MAY = {
    "metaquery": set(),
    "cli": {"metaquery"},
    "public_weights": {"metaquery"},
    "toy": {"metaquery"},
    "data": {"metaquery", "toy"},
    "training": {"metaquery", "toy", "data"},
    "train": {"metaquery", "cli", "public_weights", "toy", "data", "training"},
    "sample": {"metaquery", "cli", "public_weights", "toy"},
    "benchmarks": {"metaquery", "cli", "public_weights", "toy", "sample"},
    "notebooks": {"metaquery", "cli", "public_weights", "toy", "data", "training", "sample"},
    "app": {"metaquery", "cli", "public_weights", "toy", "sample", "notebooks"},
}
ANYTHING = ("extras", "tests")


def module_of(path):
    """toy/scene.py as "toy.scene"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The project's own modules that a file imports, at its top or inside functions."""
    modules = {module_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
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
        elif own not in ANYTHING:
            assert room(name) == own or room(name) in MAY[own], f"{own} may not import {name}"
            assert room(name) != "extras", "nothing outside extras/ imports extras/"


def test_there_is_no_circle():
    edges = {module_of(path): set(imports_of(path)) for path in FILES}
    while leaves := [module for module, needs in edges.items() if not needs & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, f"a circle among {sorted(edges)}"


def test_no_two_modules_have_one_name():
    names = [path.stem for path in FILES if path.stem not in ("__init__", "__main__")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)


def test_no_file_touches_the_search_path():
    word = "sys." + "path"
    assert not [path for path in FILES if word in path.read_text(encoding="utf-8")]


def test_nobody_replaces_a_method_from_outside():
    """Seams are overridden in subclasses: no assignment to another object's method is left."""
    methods = {"forward", "read_prompt", "run_queries", "encode_latents", "encode_prompts"}
    for path in FILES:
        if room(module_of(path)) == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = getattr(node, "targets", [])
            names = [target.attr for target in targets if isinstance(target, ast.Attribute)]
            assert not methods & set(names), f"{path}: {names}"
