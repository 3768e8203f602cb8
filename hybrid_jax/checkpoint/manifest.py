"""Checksums of a checkpoint: what was written, so that a reader can tell when it is no longer that.

DIR/manifest.json holds two levels. *Files*: size and xxh3-128 of every file of the directory,
metadata included. *Arrays*: a digest of every shard of every array that binds its bytes to the
array's name, shape, dtype and the place of the shard. The manifest carries its own sha256. xxh3
finds accidents at the speed of memory; it is no protection against somebody who forges both.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from hybrid_jax.checkpoint import atomic

NAME = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 22
# Hashing gives up the GIL; two threads keep up with any disk.
_THREADS = 4


class Damaged(ValueError):
    """A checkpoint is not what its manifest says; the message names what differs."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of an array as one device holds it."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    digest: str
    """xxh3-128 of what `_header` says and the bytes in C order."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    shards: tuple[Shard, ...]
    """Each part once, by where it begins."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was written."""

    files: Mapping[str, tuple[int, str]]
    """Size in bytes and xxh3-128 by path below the directory, with '/'."""
    arrays: Mapping[str, Array]
    """By name; empty for a directory that was hashed by somebody who had only its files."""


def describe(arrays: Mapping[str, jax.Array]) -> dict[str, Array]:
    """Digests of what this process holds of each array, of copies the first only.

    Reads device memory as it is: call it before an update gives the arrays away.
    """
    names = sorted(arrays)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _describe(name, arrays[name]), names)
        return dict(zip(names, found, strict=True))


def merge(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """What several processes described of the same arrays, as one."""
    merged = {}
    for name, array in parts[0].items():
        shards = {shard.begin: shard for part in parts for shard in part[name].shards}
        merged[name] = dataclasses.replace(
            array, shards=tuple(shards[begin] for begin in sorted(shards))
        )
    return merged


def to_json(arrays: Mapping[str, Array]) -> dict:
    """Arrays as they stand in the file."""
    return {name: dataclasses.asdict(array) for name, array in arrays.items()}


def from_json(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of `to_json`. Raises KeyError or TypeError for what it did not make."""

    def shard(found) -> Shard:
        return Shard(tuple(found["begin"]), tuple(found["shape"]), found["digest"])

    return {
        name: Array(tuple(found["shape"]), found["dtype"], tuple(map(shard, found["shards"])))
        for name, found in arrays.items()
    }


def write(directory, arrays: Mapping[str, Array] | None = None) -> Manifest:
    """Hash every file of a directory and write its manifest, whole or not at all.

    Call it when all else is in place: what is added later is foreign to the manifest.
    """
    directory = pathlib.Path(directory)
    manifest = Manifest(_hash_files(directory, _list(directory)), dict(arrays or {}))
    body = _body(manifest)
    text = json.dumps(body | {"sha256": _own_digest(body)}, indent=1, sort_keys=True)
    atomic.write_text(directory / NAME, text + "\n")
    return manifest


def read(directory) -> Manifest:
    """The manifest of a directory.

    Raises FileNotFoundError if there is none, Damaged if it was changed or cut short.
    """
    path = pathlib.Path(directory) / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {NAME}: its writer did not finish, or wrote none."
        )
    try:
        body = json.loads(path.read_bytes())
        stated = body.pop("sha256")
        if stated != _own_digest(body):
            raise ValueError("its own sha256 does not fit it")
        if body["format"] != _FORMAT:
            raise ValueError(f"its format is {body['format']!r}; this version reads {_FORMAT}")
        return _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}.") from error


def verify(directory) -> Manifest:
    """Read every file and hold it against the manifest, which is returned.

    Raises FileNotFoundError without a manifest; Damaged with every file that is missing, foreign,
    of another size or of other contents.
    """
    directory = pathlib.Path(directory)
    manifest = read(directory)
    present = set(_list(directory))
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - present)]
    problems += [
        f"{name} was not written by it" for name in sorted(present - manifest.files.keys())
    ]
    found = _hash_files(directory, sorted(present & manifest.files.keys()))
    for name, (size, digest) in sorted(found.items()):
        wanted_size, wanted = manifest.files[name]
        if size != wanted_size:
            problems.append(f"{name} has {size} bytes, not {wanted_size}")
        elif digest != wanted:
            problems.append(f"{name} has other contents (xxh3-128 {digest}, not {wanted})")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Damaged(
            f"The checkpoint {directory} is not what was written: {'; '.join(problems[:5])}{more}."
        )
    return manifest


def check_arrays(manifest: Manifest, arrays: Mapping[str, jax.Array]) -> None:
    """Hold restored arrays against the manifest: names, shapes, dtypes, and contents.

    Contents are compared for parts that are held here as they were written, which on the same mesh
    are all, and for whole arrays that are here. Raises Damaged naming what differs.
    """
    problems = []
    for name in sorted(manifest.arrays.keys() | arrays.keys()):
        wanted, array = manifest.arrays.get(name), arrays.get(name)
        if wanted is None or array is None:
            problems.append(f"{name} is {'missing' if array is None else 'not in its manifest'}")
        elif (tuple(array.shape), str(array.dtype)) != (wanted.shape, wanted.dtype):
            is_, was = (f"{x.dtype}{list(x.shape)}" for x in (array, wanted))
            problems.append(f"{name} is {is_}, not {was}")
        elif differing := _differing(name, wanted, array):
            problems.append(f"{name} has other contents in the part {differing}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Damaged(f"Restored arrays are not what was saved: {'; '.join(problems[:5])}{more}.")


def _differing(name: str, wanted: Array, array: jax.Array) -> str | None:
    """The first part whose contents differ, as text."""
    here = {_place(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    whole = None
    for shard in wanted.shards:
        data = here.get((shard.begin, shard.shape))
        if data is None and array.is_fully_addressable:
            whole = np.asarray(array) if whole is None else whole
            data = whole[tuple(slice(b, b + n) for b, n in zip(shard.begin, shard.shape))]
        if data is None:
            continue
        if _digest(name, wanted.shape, wanted.dtype, shard.begin, np.asarray(data)) != shard.digest:
            return str([f"{b}:{b + n}" for b, n in zip(shard.begin, shard.shape)])
    return None


def _describe(name: str, array: jax.Array) -> Array:
    shape, dtype = tuple(array.shape), str(array.dtype)
    shards = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            begin, size = _place(shard.index, shape)
            digest = _digest(name, shape, dtype, begin, np.asarray(shard.data))
            shards.append(Shard(begin, size, digest))
    return Array(shape, dtype, tuple(sorted(shards, key=lambda shard: shard.begin)))


def _place(index, shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a shard begins, and its sizes."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return tuple(begin for begin, _ in bounds), tuple(end - begin for begin, end in bounds)


def _digest(name: str, shape, dtype: str, begin, part: np.ndarray) -> str:
    header = json.dumps([name, dtype, list(shape), list(begin), list(part.shape)]).encode()
    digest = xxhash.xxh3_128(header + b"\0")
    # As bytes: numpy's own buffers know no bfloat16.
    flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    digest.update(flat.data)
    return digest.hexdigest()


def _list(directory: pathlib.Path) -> list[str]:
    """Every file below a directory but its manifest, links not followed."""
    found = []
    for place, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(place, name).relative_to(directory).as_posix()
            if path != NAME and not path.startswith(f"{NAME}."):
                found.append(path)
    return sorted(found)


def _hash_files(directory: pathlib.Path, names: list[str]) -> dict[str, tuple[int, str]]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(directory / name), names)))


def _hash_file(path: pathlib.Path) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _blocks(file) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _body(manifest: Manifest) -> dict:
    return {
        "format": _FORMAT,
        "files": {
            name: {"bytes": size, "xxh3_128": digest}
            for name, (size, digest) in manifest.files.items()
        },
        "arrays": to_json(manifest.arrays),
    }


def _parse(body: dict) -> Manifest:
    return Manifest(
        {name: (each["bytes"], each["xxh3_128"]) for name, each in body["files"].items()},
        from_json(body["arrays"]),
    )


def _own_digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
