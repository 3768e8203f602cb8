"""Which files a path means, in an order that is the same on every machine."""

import fnmatch
import glob
import pathlib


def find_files(path: str, pattern: str = "*", exclude=()) -> list[tuple[str, pathlib.Path]]:
    """(name relative to the root, file) of every file at `path`, sorted by name.

    `path` is a directory (searched recursively for files called `pattern`), a file, or a glob
    ('**' crosses directories). Hidden files and directories are passed over, as is whatever
    matches one of `exclude` (globs over the relative name).

    Raises FileNotFoundError if nothing is at `path`, ValueError if no file remains.
    """
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
    kept = [
        (name, file)
        for name, file in named
        if not any(part.startswith(".") for part in name.split("/"))
        and not any(fnmatch.fnmatch(name, glob_) for glob_ in exclude)
    ]
    if not kept:
        raise ValueError(
            f"No text found at {path!r} (pattern {pattern!r}, exclude {list(exclude)}): no file. "
            "Give a directory with files, one file, or a glob."
        )
    return kept


def _fixed_part(path: pathlib.Path) -> pathlib.Path:
    """The longest leading directory of a glob that holds no wildcard."""
    fixed = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return pathlib.Path(*fixed)
