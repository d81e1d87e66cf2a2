"""The structure of the package, read from its sources: wings, floors, arrows, and the longest module and function.

``python -m tests.structure`` prints the figures that `tests/unit/test_imports.py` holds.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest_nullspace

PACKAGE = Path(pytest_nullspace.__file__).parent
NAME = PACKAGE.name


def sources() -> dict[str, Path]:
    """Every module of the package by its name within it, such as ``report.terminal``; the package itself is ``""``."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    return names


def wing(module: str) -> str:
    """The wing of a module: its folder, or itself where it lies on the ground."""
    return module.partition(".")[0]


def imports(file: Path, *, deferred: bool = True, for_types: bool = False) -> set[str]:
    """The full names of the modules that ``file`` imports.

    Args:
        file: The source.
        deferred: Also those imported inside functions.
        for_types: Also those under ``if TYPE_CHECKING``.
    """
    found: set[str] = set()

    def visit(nodes: Iterator[ast.AST] | list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                module = node.module or ""
                found.add(module)
                if module == NAME or (PACKAGE.parent / module.replace(".", "/")).is_dir():
                    found.update(f"{module}.{alias.name}" for alias in node.names)
            elif _is_type_checking(node) and not for_types:
                assert isinstance(node, ast.If)
                visit(node.orelse)
            elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(file.read_text("utf-8")).body)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(names: set[str]) -> set[str]:
    """Of imported names, the modules of this package, without its own name."""
    known = sources()
    return {
        short for name in names if name.startswith(f"{NAME}.") and (short := name.removeprefix(f"{NAME}.")) in known
    }


def wings(names: set[str]) -> set[str]:
    """Of imported names, the wings of this package to which they lead."""
    return {wing(module) for module in own(names)}


def arrows() -> dict[str, set[str]]:
    """Each wing with those that it imports."""
    found: dict[str, set[str]] = {}
    for module, file in sources().items():
        if module:
            found.setdefault(wing(module), set()).update(wings(imports(file)) - {wing(module)})
    return found


def floors(of: Mapping[str, set[str]]) -> list[list[str]]:
    """The wings by floor: each stands one above the highest that it imports.

    Raises:
        graphlib.CycleError: They import each other in a circle.
    """
    height: dict[str, int] = {}
    for name in TopologicalSorter(of).static_order():
        height[name] = 1 + max((height[below] for below in of[name]), default=0)
    return [sorted(n for n, at in height.items() if at == floor) for floor in range(1, max(height.values()) + 1)]


def module_lengths() -> dict[str, int]:
    """The lines of each module."""
    return {module: len(file.read_text("utf-8").splitlines()) for module, file in sources().items()}


def function_lengths() -> dict[str, int]:
    """The lines of each function, by ``module.Class.function``, its docstring left out."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{where}.{child.name}"
                if not isinstance(child, ast.ClassDef):
                    found[name] = (child.end_lineno or child.lineno) - child.lineno + 1 - _docstring_lines(child)
                visit(child, name)

    for module, file in sources().items():
        visit(ast.parse(file.read_text("utf-8")), module or NAME)
    return found


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0


def main() -> None:
    """Print the figures."""
    drawn = arrows()
    print(f"{len(drawn)} wings on {len(floors(drawn))} floors, {sum(map(len, drawn.values()))} arrows")
    for number, names in reversed(list(enumerate(floors(drawn), 1))):
        print(f"  floor {number}: {', '.join(f'{n} ({len(drawn[n])} below)' for n in names)}")
    for what, lengths in (("module", module_lengths()), ("function", function_lengths())):
        for name, lines in sorted(lengths.items(), key=lambda entry: -entry[1])[:5]:
            print(f"long {what}: {name}, {lines} lines")


if __name__ == "__main__":
    main()
