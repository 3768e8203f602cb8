"""Files and folders of a checkpoint in object storage, read in ranges through fsspec."""

import concurrent.futures
import os
import pathlib
import posixpath
import re

from hybrid_jax.checkpoint.formats import files

# A request takes tens of milliseconds, in which a connection delivers this much.
GAP_BYTES = 1 << 20
# Enough in flight for a fast network; a longer range is cut into pieces, which come at once.
AHEAD_BYTES = 1 << 27
_PIECE_BYTES = 1 << 24
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_remote(path) -> bool:
    """Whether a path names a file system: `s3://bucket/model`, `gs://...`, `memory://...`."""
    return _SCHEME.match(os.fspath(path)) is not None


class RemoteFile:
    """One object; each range is a request of its own, long ones are several at once."""

    gap_bytes = GAP_BYTES
    ahead_bytes = AHEAD_BYTES

    def __init__(self, filesystem, path: str, name: str):
        self.name = name
        self._filesystem, self._path = filesystem, path
        self._identity = _state(filesystem, path)
        self.size = self._identity[0]
        if self.size < 0:
            raise ValueError(f"{name}: the server does not say how long it is. Copy it to a disk.")

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` on; how many bytes were there."""
        end = min(offset + len(target), self.size)
        if offset >= end:
            return 0
        begins = range(offset, end, _PIECE_BYTES)
        if len(begins) == 1:
            return self._fetch(offset, end, target)

        def piece(begin: int) -> int:
            last = min(begin + _PIECE_BYTES, end)
            return self._fetch(begin, last, target[begin - offset : last - offset])

        done = 0
        with concurrent.futures.ThreadPoolExecutor(AHEAD_BYTES // _PIECE_BYTES) as pool:
            for begin, got in zip(begins, pool.map(piece, begins), strict=True):
                # Only what comes without a hole counts.
                if done == begin - offset:
                    done += got
        return done

    def _fetch(self, offset: int, end: int, target: memoryview) -> int:
        data = self._filesystem.cat_file(self._path, start=offset, end=end)
        if len(data) > end - offset:
            raise ValueError(
                f"{self.name}: {end - offset} bytes were asked for and {len(data)} came; the "
                "server does not know ranges. Copy the directory to a disk."
            )
        target[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """ValueError if the object is another one than when it was opened."""
        # Listings are kept, and would show it as it was.
        self._filesystem.invalidate_cache()
        try:
            now = _state(self._filesystem, self._path)
        except OSError:
            now = None
        if now != self._identity:
            raise ValueError(
                f"{self.name} has changed since it was opened. Read it when nobody writes it."
            )

    def close(self) -> None:
        """Nothing is held open."""


class RemoteFolder:
    """All objects whose name begins with the folder's; there are no links."""

    def __init__(self, path):
        self._name = os.fspath(path).rstrip("/")
        self._filesystem, self._path = _open(self._name)
        # What another folder of this process was told may be long ago.
        self._filesystem.invalidate_cache()

    def names(self, part: str = "") -> list[str]:
        """Of its objects, sorted."""
        try:
            found = self._filesystem.ls(self._inner(part), detail=True)
        except FileNotFoundError as error:
            if part:
                return []
            raise ValueError(
                f"{self._name} does not exist; expected a checkpoint directory."
            ) from error
        names = (posixpath.basename(e["name"]) for e in found if e["type"] != "directory")
        # Without a name a store keeps a folder; with a question a web server sorts its page.
        return sorted(name for name in names if name and "?" not in name)

    def below(self, part: str = "") -> list[str]:
        """Of the objects in it and in its folders, but not in theirs."""
        folders = [part]
        for entry in self._filesystem.ls(self._inner(part), detail=True):
            name = posixpath.basename(entry["name"].rstrip("/"))
            if entry["type"] == "directory" and not name.startswith("."):
                folders.append(posixpath.join(part, name))
        return sorted(posixpath.join(f, name) for f in folders for name in self.names(f))

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        return self._filesystem.isfile(self._inner(name))

    def read_bytes(self, name: str) -> bytes:
        """All of a small object."""
        size = self._filesystem.info(self._inner(name))["size"]
        files.check_small(self.where(name), int(size))
        return self._filesystem.cat_file(self._inner(name))

    def copy(self, name: str, target: pathlib.Path) -> None:
        """Fetch an object."""
        self._filesystem.get_file(self._inner(name), str(target))

    def state(self, name: str) -> list:
        """[bytes, version or time] of an object; [-1] if it has gone."""
        try:
            return _state(self._filesystem, self._inner(name))
        except FileNotFoundError:
            return [-1]

    def open(self, name: str) -> RemoteFile:
        """An object to read ranges of."""
        return RemoteFile(self._filesystem, self._inner(name), self.where(name))

    def where(self, name: str) -> str:
        """An object's place, for messages."""
        return f"{self._name}/{name}"

    def __str__(self):
        return self._name

    def _inner(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


def _state(filesystem, path: str) -> list:
    """[bytes or -1, version or time]: of what tells an object from its next version."""
    found = filesystem.info(path)
    # Names differ, and no store has all.
    versions = ("ETag", "etag", "generation", "blob_id", "Content-MD5", "Digest")
    times = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created")
    size = str(found.get("size"))
    # A time only without a version: S3 gives it to the second for an object, and finer in a list.
    told = [name for name in versions if found.get(name)] or [n for n in times if found.get(n)]
    return [int(size) if size.isdigit() else -1, {name: str(found[name]) for name in told}]


def _open(name: str):
    """(file system, path in it). ValueError says what to install, or which schemes there are."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem
    except ImportError as error:
        raise ValueError(
            f"{name} is read through fsspec, which is not installed: pip install "
            "'hybrid-jax[remote]', and s3fs, gcsfs or adlfs for the storage you use."
        ) from error
    try:
        filesystem, path = url_to_fs(name)
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be read: fsspec lacks the package of this storage. {error}: pip "
            "install what it names."
        ) from error
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
    if isinstance(filesystem, LocalFileSystem):
        raise ValueError(f"{name} is on a disk: give the path without a scheme.")
    return filesystem, path.rstrip("/")
