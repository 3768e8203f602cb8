"""Read every byte of a checkpoint again: checksums, names, shapes, dtypes and finiteness."""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import xxhash

from hybrid_jax.checkpoint import digests, finite, inspection, listing, manifest
from hybrid_jax.checkpoint.digests import Array
from hybrid_jax.checkpoint.formats.links import inside
from hybrid_jax.checkpoint.formats.orbax import OrbaxDirectory
from hybrid_jax.checkpoint.formats.protocol import DTYPES, Source, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile

# A piece is hashed and looked at while it is in a core's cache; tensors are never held whole.
_PIECE = 1 << 22
# Reading, hashing and numpy give up the GIL.
_THREADS = 4

Progress = Callable[[int], None]


@dataclasses.dataclass
class Reread:
    """What a directory turned out to be."""

    path: pathlib.Path
    tensors: int
    files: int = 0
    """Of which the bytes were hashed."""
    bytes: int = 0
    """Read, each byte of a safetensors file once; of Orbax once as files and once as tensors."""
    seconds: float = 0.0
    manifest: str = "none"
    """`none`, `holds`, `does not hold`, or `written`."""
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all holds, checksums included."""
        return not self.problems and self.manifest in ("holds", "written")


def reread(
    path, *, write_manifest: bool = False, progress: Progress = lambda count: None
) -> Reread:
    """Read a Hugging Face or Orbax directory and hold it against its config and its manifest.

    Args:
        path: The directory.
        write_manifest: Make the manifest of a directory that has none, if nothing is wrong.
        progress: Told of bytes as they are read, from several threads.

    Raises:
        ValueError: it is no checkpoint, or has a manifest already and another is asked for.
        OSError: the manifest cannot be written.
    """
    begin, path = time.monotonic(), pathlib.Path(path)
    found = inspection.inspect(path)
    if found.listing.container == listing.RUN:
        raise ValueError(f"{path} is a training run; `verification.examine` reads its checkpoints.")
    has_manifest = (path / manifest.NAME).exists()
    if has_manifest and write_manifest:
        raise ValueError(
            f"{path} has a {manifest.NAME} already. Verify it; or remove that file, if what is "
            "there now is what should be there."
        )
    result = Reread(path, len(found.listing.tensors), problems=list(found.problems))
    known = _known(path)
    read = _safetensors if found.listing.container == listing.HUGGING_FACE else _orbax
    hashed, arrays = read(path, found, known, result, progress)
    if known is not None:
        wrong = manifest.differing(path, known, hashed, progress=_counted(result, progress))
        result.files = len(known.files)
        result.problems += [f"{path}: {each}." for each in wrong]
    if has_manifest:
        result.manifest = "does not hold" if result.problems else "holds"
    elif write_manifest and not result.problems:
        written = manifest.write(path, arrays, hashed)
        result.manifest, result.files = "written", len(written.files)
    result.problems = list(dict.fromkeys(result.problems))
    result.seconds = time.monotonic() - begin
    return result


def _known(path: pathlib.Path) -> manifest.Manifest | None:
    try:
        return manifest.read(path)
    except (FileNotFoundError, manifest.Damaged):
        # A damaged one is among the problems that inspection found.
        return None


def _counted(result: Reread, progress: Progress) -> Progress:
    def count(size: int) -> None:
        result.bytes += size
        progress(size)

    return count


def _safetensors(path, found: inspection.Inspection, known, result: Reread, progress):
    """Every weight file from its first byte to its last, once: (files, arrays)."""
    absent = set(found.listing.absent)
    names = [name for name in sorted(set(found.listing.files.values())) if name not in absent]
    derived = set() if found.match is None else set(found.match.derived)

    def one(name: str):
        try:
            return _read_file(inside(path, name), derived, progress)
        except (ValueError, OSError) as error:
            # Headers that cannot be read are among the problems already, in the same words.
            return None, {}, [str(error)], 0

    hashed: dict = {}
    arrays: dict = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for name, (digest, described, wrong, count) in zip(names, pool.map(one, names)):
            result.bytes += count
            result.problems += wrong
            arrays |= described
            if digest is not None:
                hashed[name] = count, digest
    result.files = len(hashed)
    result.problems += _other_arrays(known, arrays)
    return hashed, arrays


def _read_file(place: pathlib.Path, derived: set[str], progress: Progress):
    """(xxh3-128 of the file, its arrays, what is wrong, bytes)."""
    buffer, whole = np.empty(_PIECE, np.uint8), xxhash.xxh3_128()
    arrays: dict[str, Array] = {}
    wrong: list[str] = []
    with (
        contextlib.closing(SafetensorsFile(place)) as opened,
        place.open("rb", buffering=0) as file,
    ):
        infos, size = opened.tensors, place.stat().st_size
        head = size - sum(info.nbytes for info in infos.values())
        for piece in _pieces(file, head, buffer, place, progress):
            whole.update(piece.data)
        for name, info in infos.items():
            bad = 0
            streamed = digests.Streamed(name, info.shape, str(DTYPES[info.dtype]))
            for piece in _pieces(file, info.nbytes, buffer, place, progress):
                whole.update(piece.data)
                streamed.add(piece.data)
                if name not in derived:
                    bad += finite.count_nonfinite(piece.view(DTYPES[info.dtype]))
            arrays[name] = streamed.array()
            wrong += _not_finite(place, info, bad)
        # No manifest of a mixture.
        opened.check_unchanged()
    return whole.hexdigest(), arrays, wrong, size


def _pieces(file, count: int, buffer: np.ndarray, place: pathlib.Path, progress: Progress):
    """The next bytes of a file, in a buffer that is used again."""
    while count:
        want, got = min(count, len(buffer)), 0
        while got < want:
            more = file.readinto(buffer[got:want].data)
            if not more:
                raise ValueError(f"{place} has shrunk while it was read.")
            got += more
        progress(want)
        count -= want
        yield buffer[:want]


def _orbax(path, found: inspection.Inspection, known, result: Reread, progress):
    """Every tensor, group by group; its index has a checksum of each."""
    try:
        source = OrbaxDirectory(path)
    except (ValueError, OSError):
        # Said by the inspection.
        return {}, {}
    arrays = {}
    derived = set() if found.match is None else set(found.match.derived)
    count = _counted(result, progress)
    for name, array in read_all(source, result.problems):
        info = source.tensors[name]
        streamed = digests.Streamed(name, info.shape, str(array.dtype))
        streamed.add(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        arrays[name] = streamed.array()
        if known is not None and name in known.arrays:
            try:
                # Several processes may have described a part each.
                digests.check_whole(name, known.arrays[name], array)
            except digests.Damaged as error:
                result.problems.append(str(error))
        if name not in derived:
            bad = finite.count_nonfinite(array)
            result.problems += _not_finite(pathlib.Path(source.locate(name)), info, bad)
        count(info.nbytes)
    return {}, arrays


def read_all(source: Source, problems: list[str]) -> Iterable[tuple[str, np.ndarray]]:
    """All tensors, file by file; one that cannot be read is a problem, and the next is read."""
    groups: dict[str, list[str]] = {}
    for name in source.tensors:
        groups.setdefault(source.locate(name), []).append(name)
    for names in groups.values():
        try:
            yield from source.read_many(names)
        except ValueError as error:
            problems.append(str(error))


def _other_arrays(known: manifest.Manifest | None, arrays: Mapping[str, Array]) -> list[str]:
    """Arrays that were described as one part, and are others now."""
    if known is None:
        return []
    return [
        f"The tensor {name!r} has other contents than its manifest says."
        for name, array in arrays.items()
        if name in known.arrays
        and len(known.arrays[name].shards) == 1
        and known.arrays[name].shards != array.shards
    ]


def _not_finite(place: pathlib.Path, info: TensorInfo, bad: int) -> list[str]:
    if not bad:
        return []
    size = math.prod(info.shape)
    return [f"{place}: tensor {info.name!r} holds {bad} values of {size} that are NaN or infinite."]
