"""No module of the package needs itself, not even by way of imports inside functions."""

import ast
from pathlib import Path

import star_attention

ROOT = Path(star_attention.__file__).parent
EXTENSIONS = {"star_attention._C", "star_attention._trt"}


def module_name(path):
    return ".".join(["star_attention", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def imports_of(path, modules):
    """The package's modules that a module names in import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in modules | EXTENSIONS else node.module)
    return found & modules


def circles(graph):
    """Sets of more than one module, or of one that imports itself, that reach one another."""

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for module in graph[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": set()}) == {
        frozenset("bc"),
        frozenset("d"),
    }


def test_no_circles():
    paths = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph = {name: imports_of(path, paths.keys()) for name, path in paths.items()}
    assert not circles(graph)
