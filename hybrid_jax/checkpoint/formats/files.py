"""Files and folders of a checkpoint on this machine's file systems, read in ranges."""

import os
import pathlib
import shutil
import stat
import typing

from hybrid_jax.checkpoint.formats.links import inside

# A few times what a disk with several reads in flight delivers while it seeks: cheaper than a read.
GAP_BYTES = 1 << 14
# What is meant to be read whole: a real index has some megabytes.
MAX_SMALL_BYTES = 100_000_000


class File(typing.Protocol):
    """An open file; several threads may read it."""

    name: str
    """For messages."""
    size: int
    """Bytes."""
    gap_bytes: int
    """Bytes that are better read in vain than skipped by another read."""
    ahead_bytes: int
    """How much to ask for before it is needed."""

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` on; how many bytes were there.

        Raises OSError if it is unreadable, ValueError if it is seen to have changed.
        """

    def check_unchanged(self) -> None:
        """ValueError if it is not as it was when it was opened."""

    def close(self) -> None:
        """Release it."""


class Folder(typing.Protocol):
    """A directory with files of a checkpoint; `str` of it is for messages."""

    def names(self, part: str = "") -> list[str]:
        """Of its files, or of those in one of its folders, sorted; none if there is no such one."""

    def below(self, part: str = "") -> list[str]:
        """Of all files in it and in its folders, or in `part` of it, but for hidden folders."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def read_bytes(self, name: str) -> bytes:
        """All of a small file. Raises FileNotFoundError, another OSError, or ValueError."""

    def copy(self, name: str, target: pathlib.Path) -> None:
        """Copy a file to a path on this machine. Raises OSError, or ValueError as `open` does."""

    def state(self, name: str) -> list:
        """[bytes, what else tells a file from its next version], for JSON; [-1] without a file."""

    def open(self, name: str) -> File:
        """A file to read ranges of. Raises ValueError for one that lies elsewhere."""

    def where(self, name: str) -> str:
        """A file's place, for messages."""


class LocalFile:
    """Read with pread, not mapped.

    Pages of a mapped file count as the process's memory, and a file that shrinks meanwhile must be
    an error, not a SIGBUS.
    """

    gap_bytes = GAP_BYTES
    # The kernel reads ahead.
    ahead_bytes = 0

    def __init__(self, path: pathlib.Path):
        self.name = str(path)
        _state(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        state = os.fstat(self._file.fileno())
        self.size = state.st_size
        self._identity = _identity(state)

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` on; how many bytes were there."""
        done = 0
        while done < len(target):
            # Linux cuts a read at 2 GiB.
            got = os.preadv(self._file.fileno(), [target[done : done + (1 << 30)]], offset + done)
            if not got:
                break
            done += got
        # After the reading: what was written meanwhile is found too.
        self.check_unchanged()
        return done

    def check_unchanged(self) -> None:
        """ValueError if the file has another size, time or number than when it was opened."""
        try:
            now = _identity(os.stat(self.name))
        except OSError:
            now = None
        if now != self._identity:
            raise ValueError(
                f"{self.name} has changed since it was opened: another size, time of change or "
                "inode, or no file any more. Read it when nobody writes it."
            )

    def close(self) -> None:
        """Release it."""
        self._file.close()


class LocalFolder:
    """A directory, out of which no link may lead but to the Hub's cache."""

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def names(self, part: str = "") -> list[str]:
        """Of its files and links, sorted."""
        place = self.path / part
        if part and not place.is_dir():
            return []
        return sorted(p.name for p in place.iterdir() if p.is_file() or p.is_symlink())

    def below(self, part: str = "") -> list[str]:
        """Of all files and links in it and in its folders; links to folders are not followed."""
        found = []
        for place, folders, names in os.walk(self.path / part):
            # The Hub's client keeps records of its own in such folders.
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            found += [pathlib.Path(place, name).relative_to(self.path).as_posix() for name in names]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).is_file()

    def read_bytes(self, name: str) -> bytes:
        """All of a small file."""
        if not os.path.lexists(self.path / name):
            raise FileNotFoundError(f"There is no {self.path / name}.")
        path = inside(self.path, name)
        check_small(str(path), _state(path).st_size)
        return path.read_bytes()

    def copy(self, name: str, target: pathlib.Path) -> None:
        """Copy a file, unless it lies outside."""
        shutil.copyfile(inside(self.path, name), target)

    def state(self, name: str) -> list:
        """[bytes, nanoseconds of the last change]; [-1] for a link to nothing."""
        try:
            found = os.stat(self.path / name)
        except OSError:
            return [-1]
        return [found.st_size, found.st_mtime_ns]

    def open(self, name: str) -> LocalFile:
        """A file to read ranges of."""
        return LocalFile(inside(self.path, name))

    def where(self, name: str) -> str:
        """A file's place, for messages."""
        return str(self.path / name)

    def __str__(self):
        return str(self.path)


def check_small(where: str, size: int, most: int = MAX_SMALL_BYTES) -> None:
    """ValueError for a file that is too long to be read whole."""
    if size > most:
        raise ValueError(f"{where} is {size} bytes long; expected a small file of at most {most}.")


def _state(path: pathlib.Path) -> os.stat_result:
    """Of a file or directory; opening anything else may wait for ever, or never end."""
    state = os.stat(path)
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
        raise ValueError(f"{path} is a device or a pipe; expected a file. Remove it.")
    return state


def _identity(state: os.stat_result) -> tuple:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
