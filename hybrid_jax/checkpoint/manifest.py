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
import stat
from collections.abc import Callable, Mapping

import xxhash

from hybrid_jax.checkpoint import atomic, digests, faults
from hybrid_jax.checkpoint.digests import Array, Damaged
from hybrid_jax.checkpoint.formats.files import check_small

NAME = "manifest.json"
_FORMAT = 1
# Stays in a core's cache between reading and hashing.
_BLOCK = 1 << 18
# Hashing and reading give up the GIL.
_THREADS = 4
# Of 96,103 tensors, as M2 has: 40 MB, and some hundreds if many processes saved parts of each.
MAX_BYTES = 1 << 29


# Size in bytes and xxh3-128 by path below the directory, with '/'.
Files = Mapping[str, tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was written."""

    name: str
    """Of the directory; a training checkpoint's is its step."""
    files: Files
    arrays: Mapping[str, Array]
    """By name; empty for a directory that was hashed by somebody who had only its files."""
    origin: str | None = None
    """Digest of what a conversion made it from, and how; None for anything else."""


def write(
    directory,
    arrays: Mapping[str, Array] | None = None,
    files: Files | None = None,
    *,
    name: str | None = None,
    origin: str | None = None,
) -> Manifest:
    """Force a directory to the medium and write its manifest, whole or not at all.

    `files` were hashed by others, with `hash_files` or as they wrote them; the rest is hashed here.
    `name` is what the directory will be called, if not as it is now. Call it when all else is in
    place: what is added later is foreign to the manifest.
    """
    directory = pathlib.Path(directory)
    known = dict(files or {})
    left = [path for path in _list(directory) if path not in known]
    hashed = known | _hash(directory, left)
    manifest = Manifest(name or directory.name, hashed, dict(arrays or {}), origin)
    atomic.sync(directory)
    text = _text(_body(manifest))
    atomic.write_text(directory / NAME, text, drafted=lambda: faults.reach("manifest drafted"))
    faults.reach("manifest named")
    return manifest


def hash_files(directory, number: int = 0, of: int = 1) -> dict[str, tuple[int, str]]:
    """What falls to one of `of` processes that share the files of a directory."""
    directory = pathlib.Path(directory)
    return _hash(directory, _list(directory)[number::of])


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
        check_small(path.name, path.stat().st_size, MAX_BYTES)
        text = path.read_bytes()
        body = json.loads(text)
        if body.pop("sha256") != _own_digest(body):
            raise ValueError("its own sha256 does not fit it")
        if body["format"] != _FORMAT:
            raise ValueError(f"its format is {body['format']!r}; this version reads {_FORMAT}")
        if text != _text(body).encode():
            raise ValueError("it says the same in another form")
        return _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {str(error).rstrip('.')}.") from error


def verify(
    directory,
    *,
    name: str | None = None,
    number: int = 0,
    of: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """Read every file and hold it against the manifest, which is returned.

    `name` is what the directory must have been called when it was written. One of several processes
    reads only what falls to it. `progress` is told of bytes read, from several threads. Raises
    FileNotFoundError without a manifest; Damaged with every file that is missing, foreign,
    unreadable, of another size or of other contents.
    """
    directory = pathlib.Path(directory)
    manifest = read(directory)
    problems = differing(directory, manifest, name=name, number=number, of=of, progress=progress)
    if problems:
        raise Damaged(
            f"The checkpoint {directory} is not what was written: {digests.listed(problems)}."
        )
    return manifest


def differing(
    directory,
    manifest: Manifest,
    hashed: Files | None = None,
    *,
    name: str | None = None,
    number: int = 0,
    of: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What is not as a manifest says, a phrase a file; files that are `hashed` are not read."""
    directory, hashed = pathlib.Path(directory), hashed or {}
    present = set(_list(directory))
    problems = _other_names(manifest, present, name)
    mine = sorted(present & manifest.files.keys())[number::of]

    def look(each: str) -> str | None:
        if each in hashed:
            return _other_contents(manifest.files[each], hashed[each])
        return _differs(directory / each, *manifest.files[each], progress)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        said = zip(mine, pool.map(look, mine))
        problems += [f"{each} {problem}" for each, problem in said if problem]
    return problems


def glance(directory, *, name: str | None = None) -> tuple[Manifest, list[str]]:
    """The manifest, and what names and sizes alone show to be otherwise; reads no file.

    Raises as `read` does.
    """
    directory = pathlib.Path(directory)
    manifest = read(directory)
    present = set(_list(directory))
    problems = _other_names(manifest, present, name)
    for each in sorted(present & manifest.files.keys()):
        if problem := _other_size(directory / each, manifest.files[each][0]):
            problems.append(f"{each} {problem}")
    return manifest, problems


def _other_names(manifest: Manifest, present: set[str], name: str | None) -> list[str]:
    problems = [f"{each} is missing" for each in sorted(manifest.files.keys() - present)]
    problems += [
        f"{each} was not written by it" for each in sorted(present - manifest.files.keys())
    ]
    if name not in (None, manifest.name):
        problems.append(f"it was written as {manifest.name}")
    return problems


def _other_size(path: pathlib.Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if found == size else f"has {found} bytes, not {size}"


def _differs(path: pathlib.Path, size: int, digest: str, progress) -> str | None:
    """What is wrong with a file, for a reader."""
    # A file that grew must not be read for hours.
    if problem := _other_size(path, size):
        return problem
    try:
        return _other_contents((size, digest), _hash_file(path, progress))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _other_contents(written: tuple[int, str], found: tuple[int, str]) -> str | None:
    if found[0] != written[0]:
        return f"has {found[0]} bytes, not {written[0]}"
    same = found[1] == written[1]
    return None if same else f"has other contents (xxh3-128 {found[1]}, not {written[1]})"


def _list(directory: pathlib.Path) -> list[str]:
    """Every file below a directory but its manifest, links not followed."""
    found = []
    for place, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(place, name).relative_to(directory).as_posix()
            if path != NAME and not path.startswith(f"{NAME}."):
                found.append(path)
    return sorted(found)


def _hash(directory: pathlib.Path, names: list[str]) -> dict[str, tuple[int, str]]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(directory / name), names)))


def _hash_file(path: pathlib.Path, progress=lambda count: None) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK))
    # Opening a pipe waits for ever, and a device may never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is a device or a pipe; expected a file. Remove it.")
    # Not mapped to memory: a block that the disk cannot read would kill the process.
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
            progress(count)
    return size, digest.hexdigest()


def _body(manifest: Manifest) -> dict:
    return {
        "format": _FORMAT,
        "name": manifest.name,
        "files": {
            name: {"bytes": size, "xxh3_128": digest}
            for name, (size, digest) in manifest.files.items()
        },
        "arrays": digests.to_json(manifest.arrays),
    } | ({} if manifest.origin is None else {"origin": manifest.origin})


def _parse(body: dict) -> Manifest:
    return Manifest(
        body["name"],
        {name: (each["bytes"], each["xxh3_128"]) for name, each in body["files"].items()},
        digests.from_json(body["arrays"]),
        body.get("origin"),
    )


def _text(body: dict) -> str:
    return json.dumps(body | {"sha256": _own_digest(body)}, indent=1, sort_keys=True) + "\n"


def _own_digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
