"""The repository's Python files and what each of them imports, read without running any."""

import ast
import functools
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("hybrid_jax", "pallas_kernels", "sharding", "scripts", "tests")


class Import(NamedTuple):
    """One imported module; `lazy` when the line stands inside a function."""

    module: str
    line: int
    lazy: bool


def name(file: pathlib.Path) -> str:
    """The path as a reader of the repository knows it."""
    return file.relative_to(ROOT).as_posix()


def files(*folders: str) -> list[pathlib.Path]:
    """Every Python file under the folders, in a fixed order."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(file: pathlib.Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


@functools.cache
def imports(file: pathlib.Path) -> tuple[Import, ...]:
    """Every import of a file; `from a import b` counts as a.b, since b may be a module."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            stem = f"{dots}{node.module or ''}"
            found.extend(Import(f"{stem}.{alias.name}", node.lineno, lazy) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inside)

    visit(tree(file), lazy=False)
    return tuple(found)
