"""Digests of arrays: each binds bytes to their place in an array, its name, shape and dtype."""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

# Hashing gives up the GIL; a few threads are as fast as memory.
_THREADS = 4


class Damaged(ValueError):
    """A checkpoint is not what its manifest says; the message names what differs."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of an array as one device holds it."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    digest: str
    """xxh3-128 of the above, the array's name, shape and dtype, and the bytes in C order."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    shards: tuple[Shard, ...]
    """Each part once, by where it begins."""


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process holds of an array, in host memory that no update takes."""

    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[tuple[int, ...], np.ndarray]
    """By where they begin."""


def hold(arrays: Mapping[str, jax.Array]) -> dict[str, Held]:
    """The arrays as they are now, of copies of a part the first only; for `describe`.

    The time is that of the transfer to the host. On CPUs nothing is copied: while somebody holds a
    view of a buffer, the runtime gives it to no update.
    """
    owned = {
        name: [shard for shard in array.addressable_shards if shard.replica_id == 0]
        for name, array in arrays.items()
    }
    for shards in owned.values():
        for shard in shards:
            # All at once; JAX keeps the copy, so whoever asks again, as Orbax does, gets the same.
            shard.data.copy_to_host_async()
    return {
        name: Held(
            tuple(array.shape),
            str(array.dtype),
            {_place(s.index, array.shape)[0]: np.asarray(s.data) for s in owned[name]},
        )
        for name, array in arrays.items()
    }


def describe(held: Mapping[str, Held]) -> dict[str, Array]:
    """Digests of all parts that are held."""
    names = sorted(held)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _describe(name, held[name]), names)
        return dict(zip(names, found, strict=True))


def whole(name: str, array: np.ndarray) -> Array:
    """Of an array in host memory, as one part."""
    held = Held(array.shape, str(array.dtype), {(0,) * array.ndim: array})
    return _describe(name, held)


class Streamed:
    """The description of an array whose bytes pass by in C order, never all at once."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str):
        self._shape, self._dtype = shape, dtype
        self._digest = _begun(name, shape, dtype, (0,) * len(shape), shape)

    def add(self, piece) -> None:
        """The next bytes."""
        self._digest.update(piece)

    def array(self) -> Array:
        """When all have passed."""
        whole = Shard((0,) * len(self._shape), self._shape, self._digest.hexdigest())
        return Array(self._shape, self._dtype, (whole,))


def merge(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """What several processes described of arrays that each has a part of, or some have, as one."""
    merged: dict[str, Array] = {}
    for array_of in parts:
        for name, array in array_of.items():
            known = merged.get(name, array).shards
            shards = {shard.begin: shard for shard in (*known, *array.shards)}
            merged[name] = dataclasses.replace(
                array, shards=tuple(shards[begin] for begin in sorted(shards))
            )
    return merged


def to_json(arrays: Mapping[str, Array]) -> dict:
    """Arrays as they stand in the file."""
    return {name: dataclasses.asdict(array) for name, array in arrays.items()}


def from_json(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of `to_json`. Raises KeyError or TypeError for what it did not make."""

    def sizes(found, dims: int | None = None) -> tuple[int, ...]:
        if not all(type(size) is int and size >= 0 for size in found) or dims not in (
            None,
            len(found),
        ):
            raise TypeError(f"{found!r:.200} is no place or shape")
        return tuple(found)

    def shard(found, dims: int) -> Shard:
        return Shard(sizes(found["begin"], dims), sizes(found["shape"], dims), found["digest"])

    def array(found) -> Array:
        shape = sizes(found["shape"])
        return Array(
            shape, found["dtype"], tuple(shard(each, len(shape)) for each in found["shards"])
        )

    return {name: array(found) for name, found in arrays.items()}


def check(wanted: Mapping[str, Array], arrays: Mapping[str, jax.Array]) -> list[str]:
    """Hold restored arrays against what was described: names, shapes, dtypes, and contents.

    Contents are compared for every part of which this process holds all. Returns the names of
    arrays of which it holds something that could not be compared: parts that were cut smaller.
    Raises Damaged naming what differs.
    """
    problems, uncompared = [], []
    for name in sorted(wanted.keys() | arrays.keys()):
        written, array = wanted.get(name), arrays.get(name)
        if written is None or array is None:
            problems.append(f"{name} is {'missing' if array is None else 'not in its manifest'}")
        elif form := _other_form(written, array):
            problems.append(f"{name} {form}")
        else:
            here = dict(_places(array))
            if array.is_fully_addressable:
                here[(0,) * array.ndim, array.shape] = array
            compared, differing = _compare(name, written, here)
            if differing:
                problems.append(f"{name} has other contents in the part {differing}")
            if compared < sum(map(_size, _places(array))):
                uncompared.append(name)
    if problems:
        raise Damaged(f"Restored arrays are not what was saved: {listed(problems)}.")
    return uncompared


def check_whole(name: str, written: Array, array: np.ndarray) -> None:
    """The same for one array in host memory."""
    if form := _other_form(written, array):
        raise Damaged(f"What was restored is not what was saved: {name} {form}.")
    _, differing = _compare(name, written, {((0,) * array.ndim, array.shape): array})
    if differing:
        raise Damaged(
            f"What was restored is not what was saved: {name} has other contents in the part "
            f"{differing}."
        )


def listed(problems: Sequence[str]) -> str:
    """The first five."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _other_form(written: Array, array) -> str | None:
    if (tuple(array.shape), str(array.dtype)) == (written.shape, written.dtype):
        return None
    is_, was = (f"{x.dtype}{list(x.shape)}" for x in (array, written))
    return f"is {is_}, not {was}"


def _compare(name: str, written: Array, here: Mapping) -> tuple[int, str | None]:
    """(numbers compared, the first part whose contents differ, as text)."""
    compared = 0
    for shard in written.shards:
        place = shard.begin, shard.shape
        around = place if place in here else next((p for p in here if _within(place, p)), None)
        if around is None:
            continue
        cut = tuple(slice(b - a, b - a + n) for b, a, n in zip(shard.begin, around[0], shard.shape))
        part = np.asarray(here[around])[cut]
        if _digest(name, written.shape, written.dtype, shard.begin, part) != shard.digest:
            return compared, str([f"{b}:{b + n}" for b, n in zip(shard.begin, shard.shape)])
        compared += part.size
    return compared, None


def _places(array: jax.Array) -> dict[tuple[tuple[int, ...], tuple[int, ...]], jax.Array]:
    """What this process holds of an array, each part once."""
    return {_place(s.index, array.shape): s.data for s in array.addressable_shards}


def _within(inner, outer) -> bool:
    return all(
        a <= b and b + n <= a + m
        for b, n, a, m in zip(inner[0], inner[1], outer[0], outer[1], strict=True)
    )


def _size(place) -> int:
    return math.prod(place[1])


def _describe(name: str, held: Held) -> Array:
    shards = [
        Shard(begin, part.shape, _digest(name, held.shape, held.dtype, begin, part))
        for begin, part in sorted(held.parts.items())
    ]
    return Array(held.shape, held.dtype, tuple(shards))


def _place(index, shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a shard begins, and its sizes."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return tuple(begin for begin, _ in bounds), tuple(end - begin for begin, end in bounds)


def _begun(name: str, shape, dtype: str, begin, part_shape):
    header = json.dumps([name, dtype, list(shape), list(begin), list(part_shape)]).encode()
    return xxhash.xxh3_128(header + b"\0")


def _digest(name: str, shape, dtype: str, begin, part: np.ndarray) -> str:
    digest = _begun(name, shape, dtype, begin, part.shape)
    # As bytes: numpy's own buffers know no bfloat16.
    flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    digest.update(flat.data)
    return digest.hexdigest()
