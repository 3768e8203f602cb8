"""Files and functions stay readable in one sitting; an exception is a line here with its reason."""

import ast

import pytest

from tests.architecture import source

FILE_LINES = 400
FUNCTION_LINES = 60

# "path" -> why the file may be longer.
LONG_FILES: dict[str, str] = {}
# "path::function" -> why the function may be longer.
LONG_FUNCTIONS: dict[str, str] = {}


def lines_of(file) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def functions(file):
    for node in ast.walk(source.tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{source.name(file)}::{node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_files_are_short(folder):
    sizes = {source.name(file): lines_of(file) for file in source.files(folder)}
    long = {file: size for file, size in sizes.items() if size > FILE_LINES}
    unexcused = {file: size for file, size in long.items() if file not in LONG_FILES}
    assert not unexcused, f"over {FILE_LINES} lines; split by subject: {unexcused}"


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_functions_are_short(folder):
    sizes = dict(pair for file in source.files(folder) for pair in functions(file))
    long = {name: size for name, size in sizes.items() if size > FUNCTION_LINES}
    unexcused = {name: size for name, size in long.items() if name not in LONG_FUNCTIONS}
    assert not unexcused, f"over {FUNCTION_LINES} lines; name the steps: {unexcused}"


def test_every_exception_is_still_needed():
    every = source.files(*source.FOLDERS)
    long_files = {source.name(file) for file in every if lines_of(file) > FILE_LINES}
    long_functions = {
        name for file in every for name, size in functions(file) if size > FUNCTION_LINES
    }
    stale = (set(LONG_FILES) - long_files) | (set(LONG_FUNCTIONS) - long_functions)
    assert not stale, f"no longer over budget; take them off the list: {sorted(stale)}"
