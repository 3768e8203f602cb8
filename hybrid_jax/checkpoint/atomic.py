"""Files and directories that appear whole or not at all, and what lay in their way is as before."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable


def check_free(path: pathlib.Path, *, overwrite: bool = False) -> None:
    """ValueError if a new directory cannot take this place."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} must be a directory or not exist; it is a file or a link.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(
            f"{path} exists and is not empty. Choose another destination, remove it, or ask to "
            "overwrite it."
        )


def write_text(path, text: str, drafted: Callable[[], None] = lambda: None) -> None:
    """Write a small file so that it is the old one or the new one, also after a power cut.

    `drafted` is called when it lies beside its place, complete.
    """
    path = pathlib.Path(path)
    draft = path.with_name(f"{path.name}.draft-{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        drafted()
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def sync_names(directory) -> None:
    """Force what a directory lists to the medium."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(directory) -> None:
    """Force names and data below a directory to the medium; a power cut then takes none of them."""
    for place, _, files in os.walk(directory):
        for name in [*(os.path.join(place, file) for file in files), place]:
            fd = os.open(name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def make(path: pathlib.Path) -> list[pathlib.Path]:
    """Make a directory and what is missing above it; returns what was missing, for `unmake`.

    Raises NotADirectoryError if a file is in the way.
    """
    path = pathlib.Path(path).absolute()
    missing = []
    for place in (path, *path.parents):
        if place.is_dir():
            break
        if os.path.lexists(place):
            raise NotADirectoryError(
                f"{place} must be a directory; it is a file or a link to nothing. Choose another "
                "place."
            )
        missing.append(place)
    path.mkdir(parents=True, exist_ok=True)
    return missing


def unmake(made: list[pathlib.Path]) -> None:
    """Remove directories that `make` made, as far as nothing lies in them."""
    with contextlib.suppress(OSError):
        for place in made:
            place.rmdir()


def remove(draft: pathlib.Path) -> None:
    """Remove a directory and what is in it, without an error if that fails.

    A writer that failed may have threads that add files, and folders for them, a moment longer.

    Removed is therefore what has stayed away for several looks; nothing offers to be waited for.
    """
    absences = 0
    for _ in range(30):
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
            absences = 0
        else:
            absences += 1
        if absences == 3:
            return
        time.sleep(0.1)


def replace(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Give a directory its name; what had it goes only when the new one is in place."""
    if not path.is_dir() or not any(path.iterdir()):
        os.rename(draft, path)
        sync_names(path.parent)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    os.rename(path, old)
    try:
        os.rename(draft, path)
    except BaseException:
        os.rename(old, path)
        raise
    sync_names(path.parent)
    shutil.rmtree(old, ignore_errors=True)
