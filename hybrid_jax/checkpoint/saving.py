"""Write a model's tensors into a directory: by one process, or by several that hold its parts.

No leaf is replicated or brought together. One process puts a tensor together from the parts on its
devices and writes it, one tensor at a time. Several write what they hold into the same safetensors
files, each into byte ranges of its own; Orbax's groups they save together.

What an earlier start has finished stays if its digests are those of what would be written now.
Hashing is much faster than writing, and no other model's values are ever taken for this one's.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.checkpoint import atomic, digests, manifest, origin, pieces, sidecars
from hybrid_jax.checkpoint import draft as drafts
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.contents import Contents
from hybrid_jax.checkpoint.formats import orbax, protocol, safetensors_writer
from hybrid_jax.checkpoint.formats.files import Folder
from hybrid_jax.checkpoint.names.rules import Rule
from sharding import processes

# Until what one process wrote is seen by another on a network file system.
_SECONDS_TO_APPEAR = 90

Dealt = Mapping[str, Sequence[pieces.Piece]]


def save(
    contents: Contents,
    path,
    travelling: Folder | None,
    note: Callable[[str], None],
    *,
    overwrite: bool,
) -> None:
    """Write a new directory with its manifest; it appears whole at the end, or not at all.

    Files of `travelling` that are neither weights nor config come along. All processes of the
    computation call this at once.
    """
    dealt = contents.deal() if jax.process_count() > 1 else None
    made_of = origin.of_model(contents.config[1], travelling, contents.layout, dealt)

    def prepare(directory: pathlib.Path) -> None:
        if travelling is not None:
            sidecars.copy(travelling, directory)
        name, text = contents.config
        (directory / name).write_text(text, encoding="utf-8")

    begun = drafts.begin(path, made_of, prepare, note, process=0, of=1, overwrite=overwrite)
    if dealt is None:
        with begun as draft:
            assert draft is not None
            _save_alone(contents, draft, note)
            draft.finish(contents.layout, note, overwrite=overwrite)
    else:
        _save_together(contents, dealt, made_of, begun, overwrite)


def _save_alone(contents: Contents, draft: drafts.Draft, note: Callable[[str], None]) -> None:
    layout, kept = contents.layout, 0
    for unit in layout.units:
        known = draft.recorded(unit.number)
        if known is not None and all(
            known.arrays.get(info.name) == digests.whole(info.name, contents.whole(info.name))
            for info in unit.infos
        ):
            kept += 1
            continue
        draft.forget(unit.number)
        tensors = (contents.whole(info.name) for info in unit.infos)
        draft.record(unit.number, layout.write(draft.content, unit.number, tensors))
    if kept:
        note(f"{kept} of {len(layout.units)} units were finished already, with the same values.")


def _save_together(
    contents: Contents, dealt: Dealt, made_of: origin.Origin, begun, overwrite: bool
) -> None:
    me, count = jax.process_index(), jax.process_count()
    layout = contents.layout
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            draft = stack.enter_context(begun)
            for left in draft.work.glob("share-*"):
                left.unlink()
            if isinstance(layout, safetensors_writer.SafetensorsLayout):
                _reserve(layout, draft)
            return str(draft.dst)

        draft = drafts.Draft(pathlib.Path(processes.from_first(begin)), made_of, me, count)
        files: dict[str, tuple[int, str]] = {}
        arrays: dict[str, digests.Array] = {}
        if isinstance(layout, safetensors_writer.SafetensorsLayout):
            processes.all_pass(lambda: arrays.update(_write_ranges(layout, contents, dealt, draft)))
        else:
            files, arrays = _save_groups(layout, contents, draft)

        def leave() -> None:
            here = files
            if isinstance(layout, safetensors_writer.SafetensorsLayout):
                # All have written: files that several wrote are read again, each by one.
                here = manifest.hash_files(draft.content, me, count)
            body = {"files": here, "arrays": digests.to_json(arrays)}
            atomic.write_text(_share(draft, me), json.dumps(body))

        processes.all_pass(leave)

        def finish() -> None:
            if me == 0:
                shares = [_collect(_share(draft, process)) for process in range(count)]
                found = {k: (n, d) for share in shares for k, (n, d) in share["files"].items()}
                merged = digests.merge([digests.from_json(share["arrays"]) for share in shares])
                draft.complete(layout, protocol.Written(found, merged), overwrite=overwrite)

        processes.all_pass(finish)


def _slot(number: int, process: int | None = None) -> int:
    """Where a process records its part of a unit."""
    me = jax.process_index() if process is None else process
    return number * jax.process_count() + me


def _reserve(layout: safetensors_writer.SafetensorsLayout, draft: drafts.Draft) -> None:
    """Make all files, for all to write into; of what is no longer whole nothing counts."""
    for shard in layout.units:
        path = draft.content / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            for process in range(jax.process_count()):
                draft.forget(_slot(shard.number, process))
        layout.reserve(draft.content, shard.number)


def _write_ranges(
    layout: safetensors_writer.SafetensorsLayout,
    contents: Contents,
    dealt: Dealt,
    draft: drafts.Draft,
) -> dict[str, digests.Array]:
    """Write what falls to this process into files that are there; digests of that."""
    me = jax.process_index()
    described: dict[str, digests.Array] = {}
    for shard in layout.units:
        mine = {
            info: found
            for info in shard.infos
            if (found := [piece for piece in dealt[info.name] if piece.process == me])
        }
        if not mine:
            continue
        slot = _slot(shard.number)
        known = draft.recorded(slot)
        if known is None or any(
            known.arrays.get(info.name) != _describe(info, _held(contents, info, found))
            for info, found in mine.items()
        ):
            draft.forget(slot)
            known = protocol.Written({}, _write_shard(draft, shard, contents, mine))
            draft.record(slot, known)
        described |= known.arrays
    return described


def _write_shard(
    draft: drafts.Draft,
    shard: safetensors_writer.Shard,
    contents: Contents,
    mine: Mapping[protocol.TensorInfo, Sequence[pieces.Piece]],
) -> dict[str, digests.Array]:
    path, described = draft.content / shard.name, {}
    with safetensors_writer.opened(path) as fd:
        for info, found in mine.items():
            held = _held(contents, info, found)
            for begin, array in held.parts.items():
                for place, index in pieces.runs(Box.at(begin, array.shape), info.shape):
                    first = shard.begins[info.name] + place * array.itemsize
                    data = array[index].reshape(-1).view(np.uint8).data
                    safetensors_writer.write_at(path, fd, data, first)
            described[info.name] = _describe(info, held)
    return described


def _held(
    contents: Contents, info: protocol.TensorInfo, mine: Sequence[pieces.Piece]
) -> digests.Held:
    boxes = contents.boxes(info.name, mine)
    parts = {box.begin: np.ascontiguousarray(array) for box, array in boxes}
    return digests.Held(info.shape, str(protocol.DTYPES[info.dtype]), parts)


def _describe(info: protocol.TensorInfo, held: digests.Held) -> digests.Array:
    return digests.describe({info.name: held})[info.name]


def _save_groups(
    layout: orbax.OrbaxLayout, contents: Contents, draft: drafts.Draft
) -> tuple[dict[str, tuple[int, str]], dict[str, digests.Array]]:
    """Save every group with all processes at once; what of the files and tensors is this one's."""
    done = _same_groups(layout, contents, draft)

    def clear() -> None:
        for group in layout.units:
            if group.number not in done:
                draft.forget(_slot(group.number))
                if processes.is_first():
                    orbax.clear(draft.content, group.number)

    # Nobody writes while there is a record of what was there.
    processes.all_pass(clear)
    for group in layout.units:
        if group.number in done:
            continue

        def write(group: orbax.Group = group) -> None:
            blocks = _blocks(contents, group)
            path = orbax.group_path(draft.content, group.number)
            orbax.save(path, blocks)
            files = orbax.hash_group(path, jax.process_index(), jax.process_count())
            written = protocol.Written(files, digests.describe(digests.hold(blocks)))
            draft.record(_slot(group.number), written)
            done[group.number] = written

        # One by one: the next one waits for all as well, and would not hear of an error.
        processes.all_pass(write)
    files = {name: found for written in done.values() for name, found in written.files.items()}
    arrays = {name: found for written in done.values() for name, found in written.arrays.items()}
    return files, arrays


def _same_groups(
    layout: orbax.OrbaxLayout, contents: Contents, draft: drafts.Draft
) -> dict[int, protocol.Written]:
    """Groups that every process has finished, with the values that it holds now; its part of each.

    Blocks are cut by all processes together, so all agree on what to look at.
    """
    found = {group.number: draft.recorded(_slot(group.number)) for group in layout.units}
    known = {number: written for number, written in found.items() if written is not None}
    candidates, same = _agreed(known), []

    def compare() -> None:
        for number in candidates:
            held = digests.hold(_blocks(contents, layout.units[number]))
            if digests.describe(held) == known[number].arrays:
                same.append(number)

    processes.all_pass(compare)
    return {number: known[number] for number in _agreed(same)}


def _agreed(numbers: Iterable[int]) -> list[int]:
    """Those that all processes name."""
    said = [set(json.loads(text)) for text in processes.gather(json.dumps(list(numbers)))]
    return sorted(set.intersection(*said))


def _blocks(contents: Contents, group: orbax.Group) -> dict[str, jax.Array]:
    return {
        info.name: _block(contents.rules[info.name], contents.arrays, protocol.DTYPES[info.dtype])
        for info in group.infos
    }


def _block(rule: Rule, arrays: Mapping[str, jax.Array], dtype: np.dtype) -> jax.Array:
    """A layer of a stack, split over devices as the stack is."""
    array = arrays[rule.leaf]
    place = array.sharding
    if not isinstance(place, NamedSharding) or array.is_fully_addressable:
        raise ValueError(
            f"{rule.leaf} lies on {place}, and Orbax needs arrays on a mesh of all processes. "
            "Place the model on one, or save it as hf or hf-original."
        )
    if not rule.index:
        return array if array.dtype == dtype else array.astype(dtype)
    layers = len(rule.index)
    kept = PartitionSpec(*tuple(place.spec)[layers:])
    index = np.array(rule.index, np.int32)
    return _cut(NamedSharding(place.mesh, kept), layers, np.dtype(dtype))(array, index)


@functools.lru_cache
def _cut(place: NamedSharding, layers: int, dtype: np.dtype):
    """Compiled once a shape: which layer is an argument."""

    def cut(array, index):
        begin = [*index, *[0] * (array.ndim - layers)]
        sizes = (*[1] * layers, *array.shape[layers:])
        block = jax.lax.dynamic_slice(array, begin, sizes).reshape(array.shape[layers:])
        return block.astype(dtype)

    return jax.jit(cut, out_shardings=place)


def _share(draft: drafts.Draft, process: int) -> pathlib.Path:
    return draft.work / f"share-{process}.json"


def _collect(path: pathlib.Path) -> dict:
    """What a process has left, which a network file system may show later."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path} did not appear within {_SECONDS_TO_APPEAR} s: the processes do not see "
                "the same directory. Give a path on a file system that all of them share."
            )
        time.sleep(0.1)
    return json.loads(path.read_text(encoding="utf-8"))
