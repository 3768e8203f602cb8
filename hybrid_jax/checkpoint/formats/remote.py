"""Files and folders of a checkpoint in object storage, read in ranges through fsspec."""

import os
import posixpath
import re

from hybrid_jax.checkpoint.formats import files

# A request takes tens of milliseconds, in which a connection delivers this much.
GAP_BYTES = 1 << 20
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_remote(path) -> bool:
    """Whether a path names a file system: `s3://bucket/model`, `gs://...`, `memory://...`."""
    return _SCHEME.match(os.fspath(path)) is not None


class RemoteFile:
    """One object; each range is a request of its own."""

    gap_bytes = GAP_BYTES

    def __init__(self, filesystem, path: str, name: str):
        self.name = name
        self._filesystem, self._path = filesystem, path
        self._identity = self._facts()
        if not self._identity.get("size", "").isdigit():
            raise ValueError(f"{name}: the server does not say how long it is. Copy it to a disk.")
        self.size = int(self._identity["size"])

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` on; how many bytes were there."""
        end = min(offset + len(target), self.size)
        if offset >= end:
            return 0
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
        self._filesystem.invalidate_cache()
        try:
            now = self._facts()
        except OSError:
            now = None
        if now != self._identity:
            raise ValueError(
                f"{self.name} has changed since it was opened. Read it when nobody writes it."
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _facts(self) -> dict:
        # What a store calls the version of an object: names differ, and none has all.
        versions = ("ETag", "etag", "generation", "blob_id")
        times = ("LastModified", "last_modified", "mtime", "updated", "created")
        found = self._filesystem.info(self._path)
        return {name: str(found[name]) for name in ("size", *versions, *times) if name in found}


class RemoteFolder:
    """All objects whose name begins with the folder's; there are no links."""

    def __init__(self, path):
        self._name = os.fspath(path).rstrip("/")
        self._filesystem, self._path = _open(self._name)

    def names(self) -> list[str]:
        """Of its objects, sorted."""
        try:
            found = self._filesystem.ls(self._path, detail=True)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self._name} does not exist; expected a checkpoint directory."
            ) from error
        return sorted(posixpath.basename(e["name"]) for e in found if e["type"] != "directory")

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        return self._filesystem.isfile(self._inner(name))

    def read_bytes(self, name: str) -> bytes:
        """All of a small object."""
        size = self._filesystem.info(self._inner(name))["size"]
        files.check_small(self.where(name), int(size))
        return self._filesystem.cat_file(self._inner(name))

    def open(self, name: str) -> RemoteFile:
        """An object to read ranges of."""
        return RemoteFile(self._filesystem, self._inner(name), self.where(name))

    def where(self, name: str) -> str:
        """An object's place, for messages."""
        return f"{self._name}/{name}"

    def __str__(self):
        return self._name

    def _inner(self, name: str) -> str:
        return f"{self._path}/{name}"


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
