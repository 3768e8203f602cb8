"""Weights in Orbax, as many small saves: converting needs memory for one group, not for the model.

A directory holds `hybrid_jax.json` (what is stored, in which group, with its digest), and one Orbax
checkpoint a group under `weights/`: a flat mapping from tensor name to array, in the stored dtype.
Orbax itself saves a whole tree at once and restores a flipped bit silently, hence both. Two saves
at once in one process get each other's files, so processes share the work and threads do not.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax.checkpoint import atomic, digests, manifest
from hybrid_jax.checkpoint.formats import protocol
from hybrid_jax.checkpoint.formats.files import check_small

INDEX_NAME = "hybrid_jax.json"
GROUP_BYTES = 1 << 25
_FORMAT, _VERSION = "hybrid-jax orbax weights", 2


@dataclasses.dataclass(frozen=True)
class Group:
    """One Orbax checkpoint."""

    number: int
    infos: tuple[protocol.TensorInfo, ...]


class OrbaxLayout:
    """Groups of at most `group_bytes`, or of one tensor that is larger; a unit is a group."""

    def __init__(self, infos, *, vocabulary: str, group_bytes: int = GROUP_BYTES):
        groups = protocol.cut(infos, group_bytes)
        self.units = [Group(number, group) for number, group in enumerate(groups)]
        self._vocabulary = vocabulary

    def write(
        self, directory: pathlib.Path, number: int, tensors: Iterator[np.ndarray]
    ) -> protocol.Written:
        """Save one group; Orbax gives it its name when it is whole."""
        arrays = {}
        for info, array in zip(self.units[number].infos, tensors, strict=True):
            protocol.check_planned(info, array)
            # It makes one dim of none, which are other digests.
            arrays[info.name] = np.ascontiguousarray(array).reshape(info.shape)
        path = clear(directory, number)
        path.parent.mkdir(exist_ok=True)
        # Orbax cannot store an empty dim list; a scalar goes as one value.
        save(path, {name: np.atleast_1d(array) for name, array in arrays.items()})
        described = {name: digests.whole(name, array) for name, array in arrays.items()}
        return protocol.Written(hash_group(path), described)

    def finish(self, directory: pathlib.Path, arrays: Mapping[str, digests.Array]) -> None:
        """Write the index."""
        entries = {
            info.name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "group": group.number,
                "parts": digests.to_json({"": arrays[info.name]})[""]["shards"],
            }
            for group in self.units
            for info in group.infos
        }
        index = {
            "format": _FORMAT,
            "version": _VERSION,
            "vocabulary": self._vocabulary,
            "tensors": entries,
        }
        atomic.write_text(directory / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def clear(directory: pathlib.Path, number: int) -> pathlib.Path:
    """Remove what an earlier attempt has left of a group; returns its place."""
    path = group_path(directory, number)
    for left in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(left)
    return path


def hash_group(path: pathlib.Path, number: int = 0, of: int = 1) -> dict[str, tuple[int, str]]:
    """Files of a group that fall to one of `of` processes, as the manifest names them.

    Orbax writes them, and tells nobody what it put there. They are in the page cache.
    """
    return {
        f"{path.parent.name}/{path.name}/{name}": found
        for name, found in manifest.hash_files(path, number, of).items()
    }


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Save one group, of host arrays, or by all processes at once of arrays on a mesh of them.

    OSError when the medium is full.
    """
    ocp = _orbax()
    context = ocp.Context()
    # Trained weights shrink by a tenth at most; zstd took 60% more time and 160 MB more memory.
    context.array.saving.use_compression = False
    # Nobody changes the arrays before it returns; the copy took 30 MB, and a fifth of the work.
    context.memory.deepcopy_host_arrays = False
    try:
        with context, _quiet():
            ocp.save(path, dict(arrays))
    except ValueError as error:
        # TensorStore reports a full disk as a ValueError: a page of specs around one number.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else f"{error!s:.500}"
        raise OSError(f"{path} could not be written: {reason}") from error


def reading():
    """A context of Orbax in which this process reads some arrays and waits for no other."""
    context = _orbax().Context()
    context.pytree.loading.partial_load = True
    me = jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    return context


class OrbaxDirectory:
    """What `OrbaxLayout` wrote: `tensors` in stored order, and the `vocabulary` of their names."""

    def __init__(self, directory):
        self.path = pathlib.Path(directory)
        index = _read_index(self.path / INDEX_NAME)
        self.vocabulary: str = index["vocabulary"]
        self._entries = index["tensors"]
        self.bytes_read = 0
        self.tensors = {
            name: _info(name, entry, self.path / INDEX_NAME)
            for name, entry in self._entries.items()
        }
        for group in sorted({entry["group"] for entry in self._entries.values()}):
            if not group_path(self.path, group).is_dir():
                raise ValueError(
                    f"{self.path / INDEX_NAME} names {group_path(self.path, group)}, which is "
                    "missing. Copy the directory again."
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor of its stored dtype."""
        return next(self.read_many([name]))[1]

    def read_many(self, names):
        """The named tensors, group by group: at most one group is in memory."""
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(self._entries[name]["group"], []).append(name)
        for group, members in sorted(groups.items()):
            arrays = self._load(group, members)
            for name in members:
                yield name, self._checked(name, arrays.pop(name))
            _give_back_memory()

    def locate(self, name: str) -> str:
        """Path of the group that holds a tensor."""
        return str(group_path(self.path, self._entries[name]["group"]))

    def close(self) -> None:
        """Nothing is held open."""

    def _load(self, group: int, names: list[str]) -> dict[str, np.ndarray]:
        ocp = _orbax()
        path = group_path(self.path, group)
        target = {
            name: np.empty(
                self.tensors[name].shape or (1,), protocol.DTYPES[self.tensors[name].dtype]
            )
            for name in names
        }
        try:
            with reading(), _quiet():
                return dict(ocp.load(path, target))
        except Exception as error:
            # Whatever Orbax and TensorStore raise for damaged files, it comes without a name.
            raise ValueError(
                f"{path} cannot be read (tensor {names[0]!r}, ...): {error!r:.500}"
            ) from error

    def _checked(self, name: str, array) -> np.ndarray:
        info = self.tensors[name]
        array = np.asarray(array)
        self.bytes_read += array.nbytes
        if array.dtype != protocol.DTYPES[info.dtype] or array.size * array.itemsize != info.nbytes:
            raise ValueError(
                f"{self.locate(name)}: tensor {name!r} is {array.dtype}{list(array.shape)}, "
                f"expected {info.dtype}{list(info.shape)}."
            )
        array = np.ascontiguousarray(array).reshape(info.shape)
        try:
            digests.check_whole(name, self._written(name), array)
        except digests.Damaged as error:
            raise ValueError(
                f"{self.locate(name)}: {error} The directory is damaged; copy or convert it again."
            ) from error
        return array

    def _written(self, name: str) -> digests.Array:
        """The digests of a tensor in the index."""
        entry, info = self._entries[name], self.tensors[name]
        found = {"shape": info.shape, "dtype": str(protocol.DTYPES[info.dtype])}
        try:
            written = digests.from_json({name: found | {"shards": entry["parts"]}})[name]
            count = sum(math.prod(part.shape) for part in written.shards)
        except (KeyError, TypeError):
            count = -1
        if count != math.prod(info.shape):
            raise ValueError(
                f"{self.path / INDEX_NAME}: tensor {name!r} has bad digests, not of all of it: "
                f"{entry['parts']!r:.200}."
            )
        return written


def is_orbax(directory) -> bool:
    """Whether a directory was written by `OrbaxLayout`."""
    return (pathlib.Path(directory) / INDEX_NAME).is_file()


def _orbax():
    # Seconds to import, and only this container needs it.
    from orbax.checkpoint import v1

    return v1


def _give_back_memory() -> None:
    """glibc keeps what TensorStore's threads freed: 240 MB after 3.4 GB, 45 MB with this."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _quiet():
    """Orbax logs every error that it raises; the caller's one line is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def group_path(directory: pathlib.Path, group: int) -> pathlib.Path:
    """Where a group lies."""
    return (directory / "weights" / f"{group:05d}").absolute()


def _read_index(path: pathlib.Path) -> dict:
    # It holds the digests that the manifest has.
    check_small(str(path), path.stat().st_size, manifest.MAX_BYTES)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{path} is not an index of {_FORMAT!r}.")
    if index.get("version") != _VERSION:
        raise ValueError(
            f"{path} is of version {index.get('version')!r}; this release reads {_VERSION}. "
            "Convert the weights again from where they came from, or use the release that wrote it."
        )
    entries = index.get("tensors")
    if not isinstance(entries, dict) or index.get("vocabulary") not in ("published", "tree"):
        raise ValueError(f"{path} must hold `tensors` and a `vocabulary` of 'published' or 'tree'.")
    return index


def _info(name: str, entry, path: pathlib.Path) -> protocol.TensorInfo:
    is_good = (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and entry["dtype"] in protocol.DTYPES
        and isinstance(entry.get("shape"), list)
        and all(type(size) is int and size >= 0 for size in entry["shape"])
        and type(entry.get("group")) is int
        and isinstance(entry.get("parts"), list)
    )
    if not is_good:
        raise ValueError(
            f"{path}: tensor {name!r} needs dtype, shape, group and parts; got {entry!r:.200}."
        )
    return protocol.TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
