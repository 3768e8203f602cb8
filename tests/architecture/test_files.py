"""Every file compiles, says in its first line what it is for, and test folders are packages."""

import ast
import re
import subprocess

import pytest

from tests.architecture import source

# A promise without a date outlives the one who made it: "TODO(2026-12, why): what".
UNDATED = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(\d{4}-\d{2})")

# A path in backticks that starts at the root of the repository.
OUR_PATHS = re.compile(rf"`((?:{'|'.join(source.FOLDERS)}|docs|\.ci)/[\w./-]*)`")


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_every_file_compiles(folder):
    for file in source.files(folder):
        compile(file.read_text(encoding="utf-8"), str(file), "exec")


def test_every_shell_script_parses():
    scripts = [*source.ROOT.glob("scripts/**/*.sh"), source.ROOT / ".ci" / "run"]
    for script in scripts:
        result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_every_file_says_what_it_is_for(folder):
    silent = [
        source.name(file)
        for file in source.files(folder)
        if source.tree(file).body and not ast.get_docstring(source.tree(file))
    ]
    assert not silent, f"no docstring at the top: {silent}"


def test_every_test_folder_is_a_package():
    # Without it pytest puts the folder on the path, and `import pallas_kernels` finds the tests.
    bare = {
        source.name(file.parent)
        for file in source.files("tests")
        if not (file.parent / "__init__.py").exists()
    }
    assert not bare, f"no __init__.py in {sorted(bare)}"


def test_documents_name_paths_that_exist():
    documents = [*source.ROOT.glob("*.md"), *source.ROOT.glob("docs/**/*.md")]
    missing = [
        f"{source.name(document)}: {path}"
        for document in documents
        for path in OUR_PATHS.findall(document.read_text(encoding="utf-8"))
        if not (source.ROOT / path).exists()
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("folder", source.FOLDERS)
def test_no_promise_without_a_date(folder):
    undated = [
        f"{source.name(file)}:{number}"
        for file in source.files(folder)
        if file.name != "test_files.py"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if UNDATED.search(line)
    ]
    assert not undated, f"write TODO(YYYY-MM, why): {undated}"
