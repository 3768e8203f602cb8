"""The file that --json or the like names, checked before minutes are spent on what it gets."""

import os
import pathlib


def check_writable(path: pathlib.Path | None, option: str = "--json") -> None:
    """ValueError if `path` cannot become a file; None asks for none."""
    if path is None:
        return
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(
            f"{option} {path}: there is no directory {parent}; make it, or choose another file."
        )
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be written as a file; choose another one.")
