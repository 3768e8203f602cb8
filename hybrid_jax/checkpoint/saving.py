"""Write a model's tensors into a directory: by one process, or by several that hold its parts.

No leaf is replicated or brought together. One process puts a tensor together from the parts on its
devices and writes it, one tensor at a time. Several write what they hold into the same safetensors
files, each into byte ranges of its own; Orbax's groups they save together.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.checkpoint import atomic, digests, manifest, pieces
from hybrid_jax.checkpoint.formats import orbax, safetensors_writer
from hybrid_jax.checkpoint.names.rules import Rule
from sharding import processes

# Until what one process wrote is seen by another on a network file system.
_SECONDS_TO_APPEAR = 90


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is to be written."""

    layout: safetensors_writer.SafetensorsLayout | orbax.OrbaxLayout
    rules: Mapping[str, Rule]
    """By tensor; those that no rule names are computed."""
    arrays: Mapping[str, jax.Array]
    """Leaves of the model."""
    tables: Mapping[str, Callable[[], np.ndarray]]
    """What is computed, by tensor."""

    def whole(self, name: str) -> np.ndarray:
        """A tensor of which this process holds all."""
        if name in self.tables:
            return self.tables[name]()
        rule = self.rules[name]
        return pieces.whole(rule, self.arrays[rule.leaf])


def save(
    contents: Contents, path, prepare: Callable[[pathlib.Path], None], *, overwrite: bool
) -> None:
    """Write a new directory with its manifest; it appears whole at the end, or not at all.

    `prepare` writes the small files into it. All processes of the computation call this at once.
    """
    path = pathlib.Path(path)
    if jax.process_count() > 1:
        return _save_together(contents, path, prepare, overwrite)
    with atomic.new_directory(path, overwrite=overwrite) as draft:
        prepare(draft)
        files: dict[str, tuple[int, str]] = {}
        arrays: dict[str, digests.Array] = {}
        for unit in contents.layout.units:
            tensors = (contents.whole(info.name) for info in unit.infos)
            written = contents.layout.write(draft, unit.number, tensors)
            files |= written.files
            arrays |= written.arrays
        contents.layout.finish(draft, arrays)
        manifest.write(draft, arrays, files, name=path.name)


def _save_together(contents: Contents, path: pathlib.Path, prepare, overwrite: bool) -> None:
    me, count = jax.process_index(), jax.process_count()
    layout = contents.layout
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            draft = stack.enter_context(atomic.new_directory(path, overwrite=overwrite))
            prepare(draft)
            if isinstance(layout, safetensors_writer.SafetensorsLayout):
                for shard in layout.units:
                    layout.reserve(draft, shard.number)
            return str(draft)

        draft = pathlib.Path(processes.from_first(begin))
        arrays: dict[str, digests.Array] = {}
        if isinstance(layout, safetensors_writer.SafetensorsLayout):
            processes.all_pass(lambda: arrays.update(_write_ranges(layout, contents, draft)))
        else:
            processes.all_pass(lambda: arrays.update(_save_groups(layout, contents, draft)))

        def leave() -> None:
            # All have written: files that several wrote are read again, each by one.
            files = manifest.hash_files(draft, me, count)
            body = {"files": files, "arrays": digests.to_json(arrays)}
            atomic.write_text(_share(draft, me), json.dumps(body))

        processes.all_pass(leave)

        def finish() -> None:
            if me == 0:
                shares = [_collect(_share(draft, process)) for process in range(count)]
                files = {k: (n, d) for share in shares for k, (n, d) in share["files"].items()}
                merged = digests.merge([digests.from_json(share["arrays"]) for share in shares])
                layout.finish(draft, merged)
                manifest.write(draft, merged, files, name=path.name)
            # The first one's directory takes its place.
            stack.close()

        processes.all_pass(finish)


def _write_ranges(
    layout: safetensors_writer.SafetensorsLayout, contents: Contents, draft: pathlib.Path
) -> dict[str, digests.Array]:
    """Write what falls to this process into files that are there; digests of what it wrote."""
    me = jax.process_index()
    dealt = pieces.deal(list(contents.rules.values()), contents.arrays)
    described: dict[str, digests.Array] = {}
    for shard in layout.units:
        mine = {
            info.name: [p for p in dealt.get(info.name, [_OF_FIRST]) if p.process == me]
            for info in shard.infos
        }
        if not any(mine.values()):
            continue
        with safetensors_writer.opened(draft / shard.name) as fd:
            for info in shard.infos:
                held = {}
                for box, array in _boxes(contents, info.name, mine[info.name]):
                    array = np.ascontiguousarray(array)
                    for place, index in pieces.runs(box, info.shape):
                        first = shard.begins[info.name] + place * array.itemsize
                        data = array[index].reshape(-1).view(np.uint8).data
                        safetensors_writer.write_at(draft / shard.name, fd, data, first)
                    held[box.begin] = array
                if held:
                    dtype = str(array.dtype)
                    held_here = digests.Held(info.shape, dtype, held)
                    described |= digests.describe({info.name: held_here})
    return described


# What is computed is there for everybody; the first one writes it.
_OF_FIRST = pieces.Piece(0, None)


def _boxes(
    contents: Contents, name: str, mine: Sequence[pieces.Piece]
) -> Iterator[tuple[pieces.Box, np.ndarray]]:
    for piece in mine:
        if piece.parts is None:
            array = contents.whole(name)
            yield pieces.Box((0,) * array.ndim, array.shape), array
        else:
            rule = contents.rules[name]
            for part in piece.parts:
                yield from pieces.parts(rule, contents.arrays[rule.leaf], part)


def _save_groups(
    layout: orbax.OrbaxLayout, contents: Contents, draft: pathlib.Path
) -> dict[str, digests.Array]:
    """Save every group with all processes at once; digests of what this one holds."""
    described: dict[str, digests.Array] = {}
    for group in layout.units:
        blocks = {
            info.name: _block(contents.rules[info.name], contents.arrays) for info in group.infos
        }
        orbax.save(orbax.group_path(draft, group.number), blocks)
        described |= digests.describe(digests.hold(blocks))
    return described


def _block(rule: Rule, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A layer of a stack, split over devices as the stack is."""
    array = arrays[rule.leaf]
    place = array.sharding
    if not isinstance(place, NamedSharding) or array.is_fully_addressable:
        raise ValueError(
            f"{rule.leaf} lies on {place}, and Orbax needs arrays on a mesh of all processes. "
            "Place the model on one, or save it as hf or hf-original."
        )
    if not rule.index:
        return array
    layers = len(rule.index)
    kept = PartitionSpec(*tuple(place.spec)[layers:])
    index = np.array(rule.index, np.int32)
    return _cut(NamedSharding(place.mesh, kept), layers)(array, index)


@functools.lru_cache
def _cut(place: NamedSharding, layers: int):
    """Compiled once a shape: which layer is an argument."""

    def cut(array, index):
        begin = [*index, *[0] * (array.ndim - layers)]
        sizes = (*[1] * layers, *array.shape[layers:])
        return jax.lax.dynamic_slice(array, begin, sizes).reshape(array.shape[layers:])

    return jax.jit(cut, out_shardings=place)


def _share(draft: pathlib.Path, process: int) -> pathlib.Path:
    # The manifest does not count files that are called after itself.
    return draft / f"{manifest.NAME}.share-{process}"


def _collect(path: pathlib.Path) -> dict:
    """What a process has left, which a network file system may show later; removes it."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path} did not appear within {_SECONDS_TO_APPEAR} s: the processes do not see "
                "the same directory. Give a path on a file system that all of them share."
            )
        time.sleep(0.1)
    found = json.loads(path.read_text(encoding="utf-8"))
    os.unlink(path)
    return found
