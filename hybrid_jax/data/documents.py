"""Text files as documents: found in a stable order, read, and refused if they are no text."""

import fnmatch
import glob
import pathlib
from typing import NamedTuple


class Document(NamedTuple):
    """One text file."""

    name: str
    """Path relative to the root it was found under, with '/'; stable across machines."""
    text: str


def find_documents(path: str, pattern: str = "*", exclude=()) -> tuple[list[Document], list[str]]:
    """The documents at `path`, sorted by name, and one sentence for each file left out.

    `path` is a directory (searched recursively for files called `pattern`), a file, or a glob
    ('**' crosses directories). Hidden files and directories are passed over, as is whatever
    matches one of `exclude` (globs over the relative name). Files that are empty or not UTF-8 are
    left out and reported.

    Raises FileNotFoundError if nothing is at `path`, ValueError if no document remains.
    """
    documents, complaints = [], []
    for name, file in _find_files(path, pattern, exclude):
        try:
            # Not read_text: it would change line ends.
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            complaints.append(f"{file}: not UTF-8 text (byte {error.start}); left out.")
            continue
        except OSError as error:
            complaints.append(f"{file}: cannot be read ({error.strerror}); left out.")
            continue
        if text:
            documents.append(Document(name, text))
        else:
            complaints.append(f"{file}: empty; left out.")
    if not documents:
        seen = f"{len(complaints)} unusable files: {complaints[0]}" if complaints else "no file."
        raise ValueError(
            f"No text found at {path!r} (pattern {pattern!r}, exclude {list(exclude)}): {seen} "
            "Give a directory with UTF-8 text files, one file, or a glob."
        )
    return documents, complaints


def _find_files(path: str, pattern: str, exclude) -> list[tuple[str, pathlib.Path]]:
    """(relative name, file) of every candidate, sorted by name."""
    root = pathlib.Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        files = [file for file in root.rglob(pattern) if file.is_file()]
    elif glob.has_magic(path):
        files = [pathlib.Path(match) for match in glob.glob(str(root), recursive=True)]
        files = [file for file in files if file.is_file()]
        root = _fixed_part(root)
    else:
        raise FileNotFoundError(
            f"There is no file or directory {path!r}. Give a directory, a file, or a glob."
        )
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    return [
        (name, file)
        for name, file in named
        if not any(part.startswith(".") for part in name.split("/"))
        and not any(fnmatch.fnmatch(name, glob_) for glob_ in exclude)
    ]


def _fixed_part(path: pathlib.Path) -> pathlib.Path:
    """The longest leading directory of a glob that holds no wildcard."""
    fixed = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return pathlib.Path(*fixed)
